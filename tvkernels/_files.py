"""Files that appear whole or not at all, and what tells the content of tensors."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor


@contextmanager
def atomic_path(path: Path, error: type[Exception]) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success it becomes ``path``, else it is removed.

    An interrupt counts as failure. Operating-system errors are raised as ``error``.
    """
    # The name itself may be as long as a file system takes.
    name = hashlib.sha256(path.name.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    temporary = path.with_name(f".{name}-{os.getpid()}{path.suffix[:16]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as reason:
        said = f"cannot write {path}: {reason.strerror or reason}"
        free = path.is_file() and os.access(path.parent, os.W_OK)
        if isinstance(reason, PermissionError) and free:  # Windows, of an open file
            said += ": close the program that has it open, or write to another name"
        raise error(said) from reason
    finally:
        with suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, dtypes, shapes and every byte."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
