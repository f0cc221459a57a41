"""C++ for CPUs, csrc/cpu/clip_group_norm.cpp: two passes, no permuted copy."""

from __future__ import annotations

from tvkernels import _native


def why_not(x, weight, bias, groups, eps, silu) -> list[str]:
    """Every reason against this call; empty if it runs."""
    return _native.refuse("clip_group_norm", x, weight, bias)


def forward(x, weight, bias, groups, eps, silu):
    """Shapes as in `tvkernels.clip_group_norm`."""
    return _native.load("cpu").clip_group_norm(x, weight, bias, groups, eps, silu)
