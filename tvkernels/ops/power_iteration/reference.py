"""The definition: Miyato et al., algorithm 1, one product and one norm after the other."""

from __future__ import annotations

import torch
from torch import Tensor


def why_not(*args) -> list[str]:
    """The reference runs everywhere."""
    return []


def forward(weight, u, steps):
    """Shapes as in `tvkernels.power_iteration`."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight, u = weight.to(wide), u.to(wide)
    v = weight.new_full((weight.shape[1],), max(weight.shape[1], 1) ** -0.5)
    for _ in range(steps):
        v = unit(weight.T @ u, v)
        u = unit(weight @ v, u)
    return u.clone(), v


def unit(x: Tensor, previous: Tensor) -> Tensor:
    """x / |x|, and `previous` where x is zero."""
    norm = x.square().sum().sqrt()
    return torch.where(norm > 0, x / norm.where(norm > 0, 1), previous)
