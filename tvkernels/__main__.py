"""`python -m tvkernels` is `tvk`."""

import sys


def main() -> int:
    """The command, or one line that says which extra it needs."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what the terminal's encoding lacks is shown as "?"
            stream.reconfigure(errors="replace")
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
