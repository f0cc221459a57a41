"""The definition: guidance, predicted x0, update, blend, each as the papers write it."""

from __future__ import annotations

import torch


def why_not(*args) -> list[str]:
    """The reference runs everywhere."""
    return []


def forward(sample, noise, step, mask, background):
    """Shapes as in `tvkernels.guided_ddim_step`."""
    wide = torch.promote_types(sample.dtype, torch.float32)
    x, eps = sample.to(wide), noise.to(wide)
    alpha, target, guidance = step.to(wide).unbind()
    if noise.shape != sample.shape:
        unconditional, conditional = eps.chunk(2)
        eps = unconditional + guidance * (conditional - unconditional)
    clean = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()
    result = target.sqrt() * clean + (1 - target).sqrt() * eps
    if mask is not None:
        m = mask.to(wide)
        result = result * m + background.to(wide) * (1 - m)
    return result.to(sample.dtype).contiguous()
