"""`python -m tvkernels` is `tvk`."""

import sys


def main() -> int:
    """The command, or one line that says which extra it needs."""
    try:
        from tvkernels.cli import main as tvk
    except ModuleNotFoundError as error:
        if (error.name or "tvkernels").startswith("tvkernels"):
            raise
        print(
            f"tvk: {error.name} is not installed: pip install "
            "'tvkernels[cli,diffusers,video]' (`python -m tvkernels.info` needs torch alone)",
            file=sys.stderr,
        )
        return 2
    return tvk()


if __name__ == "__main__":
    sys.exit(main())
