"""Norm and SiLU in C++ for CPUs, csrc/cpu/temporal_group_norm.cpp; the products are `cpu.py`'s."""

from __future__ import annotations

from tvkernels import _native
from tvkernels.ops.temporal_conv import cpu


def why_not(
    x, weight, bias, norm_weight, norm_bias, residual, groups, eps, stride, frames
) -> list[str]:
    """Every reason against this call; empty if it runs."""
    tensors = (x, weight, bias, norm_weight, norm_bias, residual)
    return _native.refuse("temporal_group_norm", *tensors, backward="temporal_group_norm_backward")


def forward(x, weight, bias, norm_weight, norm_bias, residual, groups, eps, stride, frames):
    """Shapes as in `tvkernels.temporal_conv`."""
    y = _activate(x, norm_weight, norm_bias, groups, eps)
    return cpu.forward(y, weight, bias, None, None, residual, groups, eps, stride, frames)


def backward(
    grads, x, weight, bias, norm_weight, norm_bias, residual, groups, eps, stride, frames
):
    """Exact gradients in closed form, without the forward pass's products."""
    y = _activate(x, norm_weight, norm_bias, groups, eps)
    dx, *found = cpu.backward(
        grads, y, weight, bias, None, None, residual, groups, eps, stride, frames
    )
    if norm_weight is not None:
        op = _native.load("cpu").temporal_group_norm_backward
        dx, *of_norm = op(dx, x, norm_weight, norm_bias, groups, eps)
        last = len(found) - (residual is not None)
        found[last:last] = of_norm
    return [dx, *found]


def _activate(x, norm_weight, norm_bias, groups, eps):
    if norm_weight is None:
        return x
    return _native.load("cpu").temporal_group_norm(x, norm_weight, norm_bias, groups, eps)
