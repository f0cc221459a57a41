"""The definition: equation 3 as written, then a copy into the foreground."""

from __future__ import annotations

import torch


def why_not(*args) -> list[str]:
    """The reference runs everywhere."""
    return []


def forward(foreground, background, mask):
    """Shapes as in `tvkernels.latent_blend`."""
    wide = torch.promote_types(foreground.dtype, torch.float32)
    m = mask.to(wide)
    foreground.copy_(foreground.to(wide) * m + background.to(wide) * (1 - m))
