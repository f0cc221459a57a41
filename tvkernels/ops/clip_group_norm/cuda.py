"""CUDA C++, csrc/kernels/clip_group_norm.cuh: parts of groups, their merge, one affine pass."""

from __future__ import annotations

from tvkernels import _device, _native

LARGEST = 2**31 - 1  # elements of a clip that an int32 counts


def why_not(x, weight, bias, groups, eps, silu) -> list[str]:
    """Every reason against this call; empty if it runs."""
    reasons = _device.refuse("clip_group_norm", x, weight, bias)
    if x.shape[0] and x.numel() // x.shape[0] > LARGEST:
        reasons.append(f"a clip of more than {LARGEST} elements")
    return reasons


def forward(x, weight, bias, groups, eps, silu):
    """Shapes as in `tvkernels.clip_group_norm`."""
    return _native.load("cuda").clip_group_norm(x, weight, bias, groups, eps, silu)
