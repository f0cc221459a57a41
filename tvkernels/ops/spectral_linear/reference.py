"""The definition: EI2 eq. 8 with the normalised weight written out."""

from __future__ import annotations

import torch
from torch import Tensor


def why_not(*args) -> list[str]:
    """The reference runs everywhere."""
    return []


def forward(x, weight, bias, sigma):
    """Shapes as in `tvkernels.spectral_linear`."""
    out = x @ normalised(weight, sigma).T
    return (out if bias is None else out + bias).contiguous()


def normalised(weight: Tensor, sigma: Tensor | None) -> Tensor:
    """W / sigma in W's dtype, worked out in float32 at least; 0 where sigma is 0.

    The exact largest singular value stands in for a sigma of None.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    sigma = torch.linalg.svdvals(wide)[0] if sigma is None else sigma.reshape(()).to(wide.dtype)
    # Both branches of a where get gradients: without the inner one they are 0 * inf at sigma = 0.
    scale = torch.where(sigma > 0, 1 / torch.where(sigma > 0, sigma, 1), 0)
    return (wide * scale).to(weight.dtype)
