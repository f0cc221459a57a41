"""Lean composed PyTorch: the update is affine in x and eps, so x0 is never formed."""

from __future__ import annotations

import torch


def why_not(*args) -> list[str]:
    """Composed of torch's own ops: runs on every device."""
    return []


def forward(sample, noise, step, mask, background):
    """Shapes as in `tvkernels.guided_ddim_step`."""
    wide = torch.promote_types(sample.dtype, torch.float32)
    alpha, target, guidance = step.to(wide).unbind()
    keep = (target / alpha).sqrt()
    add = (1 - target).sqrt() - keep * (1 - alpha).sqrt()
    eps = noise.to(wide)
    if noise.shape != sample.shape:
        unconditional, conditional = eps.chunk(2)
        eps = torch.addcmul(unconditional, conditional - unconditional, guidance)
    result = torch.addcmul(sample.to(wide) * keep, eps, add)
    if mask is not None:
        # lerp gives the background bit for bit where the mask is 0, and the result where it is 1
        result = torch.lerp(background.to(wide), result, mask.to(wide))
    return result.to(sample.dtype).contiguous()
