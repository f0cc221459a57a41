"""C++ for CPUs, csrc/cpu/shift_restricted_temporal_attention.cpp: some positions at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tvkernels import _native
from tvkernels._dispatch import OPS
from tvkernels.ops.instance_center import cpu as instance_center
from tvkernels.ops.spectral_linear.reference import normalised


def why_not(z, w_q, w_k, w_v, w_out, bias, sigma_v, sigma_out, heads) -> list[str]:
    """Every reason against this call; empty if it runs."""
    tensors = (z, w_q, w_k, w_v, w_out, bias)
    return _native.refuse(
        "shift_restricted_temporal_attention", *tensors, backward="temporal_attention_backward"
    )


def forward(z, w_q, w_k, w_v, w_out, bias, sigma_v, sigma_out, heads):
    """Shapes as in `tvkernels.shift_restricted_temporal_attention`."""
    w_v, w_out = normalised(w_v, sigma_v), normalised(w_out, sigma_out)
    ops = _native.load("cpu")
    return ops.shift_restricted_temporal_attention(z, w_q, w_k, w_v, w_out, bias, heads)


def backward(grads, z, w_q, w_k, w_v, w_out, bias, sigma_v, sigma_out, heads):
    """The block's products once more, attention's own gradients between theirs."""
    grad, attention = grads[0], OPS["temporal_attention"].backend("native")
    centered = instance_center.forward(z)
    projections = w_q, w_k, normalised(w_v, sigma_v)
    q, k, v = (F.linear(centered, weight).unflatten(-1, (heads, -1)) for weight in projections)
    attended = attention.forward(q, k, v, None).flatten(3)
    outer = grad.matmul(normalised(w_out, sigma_out)).unflatten(-1, (heads, -1))
    slopes = [x.flatten(3) for x in attention.backward([outer], q, k, v, None)]
    del q, k, v, outer
    inner = sum(slope.matmul(weight) for slope, weight in zip(slopes, projections, strict=True))
    dw_q, dw_k, dw_v = (_weight_gradient(slope, centered) for slope in slopes)
    dw_v, dsigma_v = _before_norm(dw_v, w_v, sigma_v)
    dw_out, dsigma_out = _before_norm(_weight_gradient(grad, attended), w_out, sigma_out)
    found = [grad + instance_center.backward([inner], z)[0], dw_q, dw_k, dw_v, dw_out]
    found += [] if bias is None else [grad.sum((0, 1, 2))]
    return found + [x for x in (dsigma_v, dsigma_out) if x is not None]


def _weight_gradient(outer: Tensor, x: Tensor) -> Tensor:
    """Of a projection of x."""
    return outer.flatten(0, 2).T @ x.flatten(0, 2)


def _before_norm(grad: Tensor, weight: Tensor, sigma: Tensor | None):
    """Gradients of a weight and its sigma (None where it is) from that of `normalised`."""
    inputs = [x.detach().requires_grad_() for x in (weight, sigma) if x is not None]
    with torch.enable_grad():
        scaled = normalised(inputs[0], inputs[1] if len(inputs) > 1 else None)
    found = torch.autograd.grad(scaled, inputs, grad)
    return found if len(found) > 1 else (*found, None)
