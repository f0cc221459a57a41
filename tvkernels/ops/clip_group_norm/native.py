"""C++ for CPUs, csrc/cpu/clip_group_norm.cpp: two passes, four with gradients, none permuted."""

from __future__ import annotations

from tvkernels import _native


def why_not(x, weight, bias, groups, eps, silu) -> list[str]:
    """Every reason against this call; empty if it runs."""
    return _native.refuse("clip_group_norm", x, weight, bias, backward="clip_group_norm_backward")


def forward(x, weight, bias, groups, eps, silu):
    """Shapes as in `tvkernels.clip_group_norm`."""
    return _native.load("cpu").clip_group_norm(x, weight, bias, groups, eps, silu)


def backward(grads, x, weight, bias, groups, eps, silu):
    """Exact gradients in closed form: one more reduction, then one pass."""
    op = _native.load("cpu").clip_group_norm_backward
    return list(op(grads[0], x, weight, bias, groups, eps, silu))
