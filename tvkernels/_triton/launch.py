"""The one way an op starts a kernel, so that offline gates see exactly what a device would run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tvkernels._triton.configs import INTERPRETER, architecture
from tvkernels._triton.support import interpreted

OPTIONS = ("num_warps", "num_stages", "maxnreg")
# Said, for its default turns off in triton 3.10, and then every FFMA is an FMUL and an FADD.
FUSION = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that decides how it is compiled."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]  # tensors, numbers, None
    constants: Mapping[str, Any]  # constexpr parameters
    options: Mapping[str, Any]  # num_warps, num_stages and the like


@dataclass
class Recorder:
    """Launches for one architecture, kept instead of run."""

    arch: str
    launches: list[Launch] = field(default_factory=list)


_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@contextmanager
def record(arch: str) -> Iterator[Recorder]:
    """Inside, `launch` runs nothing and keeps what it was given; tensors may be fake."""
    recorder = Recorder(arch)
    token = _recorder.set(recorder)
    try:
        yield recorder
    finally:
        _recorder.reset(token)


def arch(x: Tensor) -> str:
    """The architecture whose configurations a launch on x's device takes."""
    recorder = _recorder.get()
    if recorder is not None:
        return recorder.arch
    if interpreted():
        return INTERPRETER
    return architecture(*torch.cuda.get_device_capability(x.device))


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Mapping[str, Any],
    config: Mapping[str, int],
    **constants: Any,
) -> None:
    """Starts a kernel on the device of its tensors; no program starts where the grid is empty.

    Args:
        kernel: a `triton.jit` function.
        grid: programs along x, y, z. Only x may exceed 65,535.
        arguments: its tensors and run-time numbers by name; others, for other kernels of the same
            call, may be among them.
        config: as `configs.choose` gives it: constexpr parameters and num_warps, num_stages.
        constants: the other constexpr parameters.
    """
    if 0 in grid:
        return
    options = FUSION | {name: value for name, value in config.items() if name in OPTIONS}
    constants |= {name: value for name, value in config.items() if name not in options}
    # Triton itself refuses names that the kernel has not, but only where it compiles.
    names = set(kernel.arg_names)
    if constants.keys() - names:
        raise TypeError(f"{kernel.fn.__name__} has no {', '.join(constants.keys() - names)}")
    arguments = {name: value for name, value in arguments.items() if name in names}
    recorder = _recorder.get()
    if recorder is not None:
        recorder.launches.append(Launch(kernel, grid, arguments, constants, options))
        return
    device = next(x.device for x in arguments.values() if isinstance(x, Tensor))
    with torch.cuda.device(device if device.type == "cuda" else -1):
        kernel[grid](**arguments, **constants, **options)
