"""Lean composed PyTorch: the constant folds into the weight, product and bias are one call."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tvkernels.ops.spectral_linear.reference import normalised


def why_not(*args) -> list[str]:
    """Composed of torch's own ops: runs on every device."""
    return []


def forward(x, weight, bias, sigma):
    """Shapes as in `tvkernels.spectral_linear`."""
    return F.linear(x, normalised(weight, sigma), bias).contiguous()


def backward(grads, x, weight, bias, sigma):
    """Exact gradients without running the product again."""
    grad = grads[0]
    flat = grad.reshape(-1, grad.shape[-1])
    weight = weight.detach().requires_grad_()
    sigma = None if sigma is None else sigma.detach().requires_grad_()
    leaves = [leaf for leaf in (weight, sigma) if leaf is not None]
    with torch.enable_grad():
        folded = normalised(weight, sigma)
    dweight, *dsigma = torch.autograd.grad(folded, leaves, flat.T @ x.reshape(-1, x.shape[-1]))
    dbias = [] if bias is None else [flat.sum(0)]
    return [grad @ folded.detach(), dweight, *dbias, *dsigma]
