"""The definition: every layer times what those in front of it let through, summed."""

from __future__ import annotations

import torch


def why_not(*args) -> list[str]:
    """The reference runs everywhere."""
    return []


def forward(layers, alpha):
    """Shapes as in `tvkernels.atlas_composite`."""
    wide = torch.promote_types(layers.dtype, torch.float32)
    behind = layers.new_ones((layers.shape[0], 1, layers.shape[2]), dtype=wide)
    opacity = torch.cat([alpha.to(wide), behind], 1)
    through = torch.cat([behind, 1 - opacity[:, :-1]], 1).cumprod(1)
    return ((through * opacity)[..., None] * layers.to(wide)).sum(1).to(layers.dtype)
