"""Lean composed PyTorch: one pass, the background bit for bit where the mask is 0."""

from __future__ import annotations

import torch


def why_not(*args) -> list[str]:
    """Composed of torch's own ops: runs on every device."""
    return []


def forward(foreground, background, mask):
    """Shapes as in `tvkernels.latent_blend`."""
    wide = torch.promote_types(foreground.dtype, torch.float32)
    mask = mask.to(wide)
    if foreground.dtype == wide:
        torch.lerp(background, foreground, mask, out=foreground)
    else:
        foreground.copy_(torch.lerp(background.to(wide), foreground.to(wide), mask))
