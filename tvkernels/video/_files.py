"""What reading and writing share: the one error type, soft imports, atomic output."""

from __future__ import annotations

import importlib
import os
from functools import partial
from pathlib import Path
from types import ModuleType

from tvkernels import _files

LONGEST = 255  # bytes of a name that file systems take


class VideoError(ValueError):
    """A clip cannot be read or written as asked. One line: what is wrong, and what would work."""


def need(module: str) -> ModuleType:
    """Import ``module`` on first use, or raise ImportError naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"video files need {module.partition('.')[0]}, which is not installed: "
            "pip install 'tvkernels[video]'"
        ) from error


def check_output(path: str | os.PathLike, suffixes: tuple[str, ...]) -> Path:
    """Raise VideoError now if ``path`` could not be written later; creates nothing.

    Args:
        path: output file; missing parent folders are fine, they are created on writing.
        suffixes: accepted endings, lower case, with the dot; "" accepts a folder.
    """
    path = Path(path)
    if not path.name:
        raise VideoError(f"cannot write {path}: it is no file's name, give one such as edited.mp4")
    size = len(os.fsencode(path.name))
    if size > LONGEST:
        raise VideoError(f"cannot write {path}: its name has {size} bytes, at most {LONGEST} do")
    if path.suffix.lower() not in suffixes:
        wanted = ", ".join(suffix or "a folder (no ending)" for suffix in suffixes)
        raise VideoError(f"cannot write {path}: its ending must be one of {wanted}")
    if path.suffix and path.is_dir():
        raise VideoError(f"cannot write {path}: it is a folder")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise VideoError(f"cannot write {path}: {folder} is a file, not a folder")
    if not os.access(folder, os.W_OK):
        raise VideoError(f"cannot write {path}: no permission to write in {folder}")
    return path


def url(path: Path) -> str:
    """A name that FFmpeg takes for a file's, whatever colons and signs it holds."""
    return f"file:{path.absolute()}"


atomic_path = partial(_files.atomic_path, error=VideoError)
