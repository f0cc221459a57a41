"""The definition, as published code runs it: positions become a batch of sequences of frames."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def why_not(*args) -> list[str]:
    """The reference runs everywhere."""
    return []


def forward(x, weight, bias, norm_weight, norm_bias, residual, groups, eps, stride, frames):
    """Shapes as in `tvkernels.temporal_conv`."""
    b, f, c, h, w = x.shape
    out = (b, (frames - 1) // stride + 1, weight.shape[0], h, w)
    if x.numel() == 0 or weight.numel() == 0:
        return sum(t.sum() for t in (x, weight) if t.numel()) * 0 + x.new_zeros(out)
    y = x.permute(0, 3, 4, 2, 1).reshape(b * h * w, c, f)
    if norm_weight is not None:
        y = F.silu(F.group_norm(y, groups, norm_weight, norm_bias, eps))
    if frames != f:
        y = y[..., torch.arange(frames, device=x.device) * f // frames]
    y = F.conv1d(y, weight, bias, stride, padding=weight.shape[2] // 2)
    y = y.reshape(b, h, w, *y.shape[1:]).permute(0, 4, 3, 1, 2)
    return (y if residual is None else y + residual).contiguous()
