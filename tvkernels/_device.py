"""What the CUDA library asks of a call: its code on the tensors' device, one device, a dtype."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tvkernels import _native

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST = (8, 0)  # compute capability


def refuse(op: str, *tensors: Tensor | None) -> list[str]:
    """What stands against a call of a CUDA op: its library, a device, a dtype.

    Args:
        op: its name in the library.
        tensors: those whose elements the kernels read, None for those not given.
    """
    given = [x for x in tensors if x is not None]
    reasons = []
    odd = {x.dtype for x in given if x.is_floating_point()} - set(DTYPES)
    if odd:
        names = ", ".join(sorted(str(dtype) for dtype in odd))
        reasons.append(f"no kernel for {names}: float16, bfloat16 or float32")
    devices = sorted({str(x.device) for x in given})
    device = given[0].device
    if len(devices) > 1:
        reasons.append(f"the tensors are on {', '.join(devices)}")
    elif device.type != "cuda":
        reasons.append(f"the tensors are on the {device.type}, the kernels need a CUDA device")
    missing = _native.why_not("cuda", op)
    if not missing and len(devices) == 1 and device.type == "cuda":
        missing = _code(device.index)
    return reasons + list(missing)


@cache
def _code(device: int) -> tuple[str, ...]:
    """What a device lacks to run the library's kernels."""
    capability = torch.cuda.get_device_capability(device)
    name = f"compute capability {capability[0]}.{capability[1]}"
    if capability < OLDEST:
        return (f"{name}: {OLDEST[0]}.{OLDEST[1]} or newer is needed",)
    if not _native.load("cuda").has_code(device):
        return (f"the library was built without code for {name}: see TVKERNELS_CUDA_ARCHS",)
    return ()
