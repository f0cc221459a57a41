"""Every Python that pyproject.toml promises, by the interpreters of this machine.

Each one compiles every source file, which shows its syntax alone and takes seconds. `--install`
gives each an environment in build/ with torch and the pure wheel, imports the package there and
runs `python -m tvkernels.info`: gigabytes, because PyPI's torch brings CUDA along. `--newest`
prints the newest interpreter and does no more. What was not run is said. Exit status 1 where a
check fails.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("tvkernels", "pipelines", "benchmarks", "tests")
PLACES = (
    "~/.pyenv/versions/{}*/bin",
    "~/.local/share/uv/python/cpython-{}*/bin",
    "/opt/python*/{}*/bin",
)
COMPILE = """
import sys, warnings
warnings.simplefilter("error")  # an escape that is none, a comparison by identity
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        compile(file.read(), path, "exec")
print(len(sys.argv) - 1, "files compiled")
"""
IMPORT = """
import importlib, pkgutil, tvkernels
assert "python-" in tvkernels.__file__, tvkernels.__file__
for name in tvkernels.__all__:
    getattr(tvkernels, name)
from tvkernels import pipelines, video
from tvkernels.info import main
main([])
"""


def promised() -> list[str]:
    """The versions in pyproject.toml's classifiers, oldest first."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)


def interpreter(version: str) -> str | None:
    """Where python3.X is: on the PATH, else where pyenv, uv and others keep theirs."""
    folders = os.environ.get("PATH", "").split(os.pathsep)
    for place in PLACES:
        where = Path(place.format(version)).expanduser()
        folders += map(str, Path(where.anchor).glob(str(where.relative_to(where.anchor))))
    for folder in folders:
        found = shutil.which(f"python{version}", path=folder)
        asked = "import sys; print('%d.%d' % sys.version_info[:2])"
        if found and run(found, "-c", asked) == (0, version):  # a shim may lead nowhere
            return found
    return None


def run(*command: str, **options) -> tuple[int, str]:
    """(exit status, what it said)."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    return done.returncode, done.stdout.strip()


def compiled(python: str) -> tuple[int, str]:
    files = [ROOT / "setup.py", *(f for folder in FOLDERS for f in (ROOT / folder).rglob("*.py"))]
    return run(python, "-c", COMPILE, *map(str, files))


def imported(python: str, version: str, torch: str) -> tuple[int, str]:
    """The pure wheel beside torch, in an environment of its own."""
    folder = ROOT / "build" / f"python-{version}"
    own = str(folder / "bin" / "python")
    pip = (own, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    pure = os.environ | {"TVKERNELS_BUILD": "0"}
    said = ""
    for command in (
        (python, "-m", "venv", str(folder)),
        (*pip, torch, "setuptools>=77"),
        (*pip, "--no-deps", "--no-build-isolation", "--force-reinstall", str(ROOT)),
        (own, "-W", "error::SyntaxWarning", "-c", IMPORT),
    ):
        status, said = run(*command, cwd=folder.parent, env=pure)
        if status:
            break
    return status, said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--newest", action="store_true")
    parser.add_argument("--torch", default="torch", help="what pip is asked for")
    given = parser.parse_args()
    here = {version: interpreter(version) for version in promised()}
    if given.newest:
        found = [python for python in here.values() if python]
        print(found[-1] if found else sys.executable)
        return 0
    failed = False
    for version, python in here.items():
        if python is None:
            print(f"Python {version}: not run, no interpreter of it here")
            continue
        status, said = compiled(python)
        if not status and given.install:
            (ROOT / "build").mkdir(exist_ok=True)
            status, told = imported(python, version, given.torch)
            said += f"; {told}" if status else "; import and info run"
        elif not status:
            said += "; import was not run (make test-pythons)"
        failed |= bool(status)
        print(f"Python {version}: {'FAILED' if status else 'ok'}: {said}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
