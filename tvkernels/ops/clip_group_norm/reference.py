"""The definition: the clip brought to [B, C, F, h, w], torch's group norm, SiLU, and back."""

from __future__ import annotations

import torch.nn.functional as F


def why_not(*args) -> list[str]:
    """The reference runs everywhere."""
    return []


def forward(x, weight, bias, groups, eps, silu):
    """Shapes as in `tvkernels.clip_group_norm`."""
    if x.numel() == 0:
        return (x * weight[:, None, None] + bias[:, None, None]).contiguous()
    y = F.group_norm(x.transpose(1, 2), groups, weight, bias, eps)
    y = F.silu(y) if silu else y
    return y.transpose(1, 2).contiguous()
