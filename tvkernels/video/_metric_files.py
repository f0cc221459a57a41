"""How the metrics' networks are found on this machine, and the one error if they are not.

Nothing is downloaded: the networks take gigabytes, and whoever measures says when.
"""

from __future__ import annotations

import importlib
import os
import pickle
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from tvkernels.video._files import VideoError

# What reading raises where a file is cut short, or holds something else.
BROKEN = (OSError, ValueError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError)


class MetricError(VideoError):
    """A metric cannot be taken as asked. One line: what is missing, and what would do."""


def one_line(error: Exception) -> str:
    """The beginning of what a library says, often over many lines."""
    return textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" ...")


def need_transformers(role: str) -> ModuleType:
    """transformers, or ImportError naming the extra that brings it."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(
            f"{role} needs transformers, which is not installed: "
            "pip install 'tvkernels[diffusers]'"
        ) from error


@contextmanager
def on_disk(role: str, name: str, other: str = "a folder") -> Iterator[None]:
    """Inside, `name` is loaded for `role`: a folder, or a hub name with its copy on this machine.

    Args:
        other: what may be given in its place, for the error.
    Raises:
        MetricError: there is no such folder or copy, or what is tried inside fails.
    """
    from safetensors import SafetensorError

    folder = Path(name).is_dir()
    if not folder and (len(Path(name).parts) > 2 or name.startswith((".", "/", "~"))):
        raise MetricError(f"{role}: there is no folder {name}")
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OSError) and not folder:
            raise MetricError(
                f"{role} is not on this machine: `hf download {name}`, or give {role} {other}"
            ) from error
        raise MetricError(f"{role} cannot be loaded from {name} ({one_line(error)})") from error


def read_tensors(role: str, path: str | os.PathLike, prefix: str = "") -> dict[str, Tensor]:
    """A checkpoint's tensors, on the CPU, and whatever tables it keeps them in.

    Args:
        role: whose they are, for the error.
        path: .safetensors, or what `torch.save` wrote; no code in it is run.
        prefix: of .safetensors, only the names that begin so are read.
    Raises:
        MetricError: no such file, or not a checkpoint.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise MetricError(
            f"{role} has no weights at {path}: put them there, or give {role} a file"
        )
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
                return {name: file.get_tensor(name) for name in names}
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (*BROKEN, SafetensorError) as error:
        raise MetricError(f"{role}: {path} is no checkpoint ({one_line(error)})") from error


def fill(net: nn.Module, role: str, path: str | os.PathLike, key: str | None = None) -> nn.Module:
    """The network with a checkpoint's weights, all of them, ready to be asked.

    Args:
        key: the entry of the checkpoint in which the weights are.
    Raises:
        MetricError: the file is missing, or of another network.
    """
    if not Path(path).is_file():
        raise MetricError(
            f"{role} has no weights at {path}: V2VBench's doc/install.sh brings them, or give "
            f"{role} a file"
        )
    state = read_tensors(role, path)
    try:
        net.load_state_dict(state if key is None else state[key])
    except (RuntimeError, KeyError, TypeError) as error:
        raise MetricError(f"{role}: {path} is of another network ({one_line(error)})") from error
    return net.eval()
