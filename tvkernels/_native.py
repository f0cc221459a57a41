"""The compiled libraries: `_C_cpu.so` (C++ for CPUs) and `_C_cuda.so` (CUDA C++), loaded late.

Their ops are `torch.ops.tvkernels_cpu.<op>` and `torch.ops.tvkernels_cuda.<op>`. Nothing is loaded
until a backend is asked about a call; what stands against a library is said, never raised, here.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent  # of the libraries; tests put another one here
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load(part: str):
    """The ops of a library, `torch.ops.tvkernels_<part>`; loads it on the first call.

    Args:
        part: "cpu" or "cuda".
    Raises:
        RuntimeError: it cannot be loaded; the text has every reason.
    """
    reasons = why_not(part)
    if reasons:
        raise RuntimeError("; ".join(reasons))
    return getattr(torch.ops, f"tvkernels_{part}")


def why_not(part: str, op: str | None = None) -> list[str]:
    """Every reason why a library, or one op in it, cannot be used; empty if it can.

    Args:
        part: "cpu" or "cuda".
        op: name of an op that the library should hold.
    """
    return list(_why_not(part, op, FOLDER))


def refuse(op: str, *tensors: Tensor | None, backward: str | None = None) -> list[str]:
    """What stands against a call of a CPU op: its library, a device, a dtype.

    Args:
        op: its name in the library.
        tensors: the call's tensors of one storage dtype, None for those not given.
        backward: name of the op that gives its gradients, which a library built from older sources
            lacks; None where there is none.
    """
    given = [x for x in tensors if x is not None]
    reasons = []
    if not all(x.is_cpu for x in given):
        reasons.append(f"needs CPU tensors, got {_names(x.device for x in given)}")
    dtypes = {x.dtype for x in given}
    if len(dtypes) > 1:
        reasons.append(f"needs one dtype, got {_names(x.dtype for x in given)}")
    elif not dtypes <= set(DTYPES):
        reasons.append(f"computes in float32 at most, got {_names(dtypes)}")
    missing = [why_not("cpu", name) for name in (op, backward) if name is not None]
    return reasons + list(dict.fromkeys(reason for found in missing for reason in found))


def refuse_generic() -> list[str]:
    """What stands against an op that is slower than composed PyTorch at level generic."""
    if level() != "generic" or os.environ.get("TVKERNELS_CPU_LEVEL") == "generic":
        return []
    return ["without AVX2 it is slower than cpu; TVKERNELS_CPU_LEVEL=generic runs it anyway"]


def level() -> str:
    """The instruction set that the CPU kernels run with: "generic", "avx2" or "avx512"."""
    return _level(FOLDER)


def _names(values) -> str:
    return ", ".join(dict.fromkeys(str(x).removeprefix("torch.") for x in values))


@cache
def _why_not(part: str, op: str | None, folder: Path) -> tuple[str, ...]:
    if op is not None:
        reasons = _why_not(part, None, folder)
        if reasons or hasattr(getattr(torch.ops, f"tvkernels_{part}"), op):
            return reasons
        return (f"{_library(part, folder).name} was built without {op}: run `make native`",)
    reasons = []
    if part == "cuda" and torch.version.cuda is None:
        reasons.append("this torch is built without CUDA")
    elif part == "cuda" and not torch.cuda.is_available():
        reasons.append("no CUDA device")
    library = _library(part, folder)
    if not library.exists():
        reasons.append(
            f"not built: run `make native` in a checkout, or install with TVKERNELS_BUILD=1 "
            f"({library.name} is missing)"
        )
    if not reasons:
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            reasons.append(
                f"{library.name} does not load here, it was built for another machine or torch: "
                f"{error}; run `make native`"
            )
    return tuple(reasons)


@cache
def _level(folder: Path) -> str:
    return load("cpu").level()


def _library(part: str, folder: Path) -> Path:
    return folder / f"_C_{part}.so"
