"""Lean composed PyTorch: products of a matrix and a vector, half precision widened once."""

from __future__ import annotations

import torch
from torch import Tensor


def why_not(*args) -> list[str]:
    """Composed of torch's own ops: runs on every device."""
    return []


def forward(weight, u, steps):
    """Shapes as in `tvkernels.power_iteration`."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight, u = weight.to(wide), u.to(wide)
    v = weight.new_full((weight.shape[1],), max(weight.shape[1], 1) ** -0.5)
    if not weight.numel():
        return u.clone(), v
    for _ in range(steps):
        v = _unit(weight.mT.mv(u), v)
        u = _unit(weight.mv(v), u)
    return u, v


def _unit(x: Tensor, previous: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x)
    return torch.where(norm > 0, x / norm.where(norm > 0, 1), previous)
