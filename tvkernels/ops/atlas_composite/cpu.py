"""Lean composed PyTorch: from the back, one interpolation for each foreground."""

from __future__ import annotations

import torch


def why_not(*args) -> list[str]:
    """Composed of torch's own ops: runs on every device."""
    return []


def forward(layers, alpha):
    """Shapes as in `tvkernels.atlas_composite`."""
    wide = torch.promote_types(layers.dtype, torch.float32)
    out = layers[:, -1].to(wide)
    for i in reversed(range(alpha.shape[1])):
        out = torch.lerp(out, layers[:, i].to(wide), alpha[:, i, :, None].to(wide))
    out = out.to(layers.dtype).contiguous()
    return out if alpha.shape[1] else out.clone()


def backward(grads, layers, alpha):
    """Exact: a layer gets what it shows, an opacity the step from what lies behind it."""
    wide = torch.promote_types(layers.dtype, torch.float32)
    behind = [layers[:, -1].to(wide)]
    for i in reversed(range(1, alpha.shape[1])):
        behind.append(torch.lerp(behind[-1], layers[:, i].to(wide), alpha[:, i, :, None].to(wide)))
    dlayers, dalpha = torch.empty_like(layers), torch.empty_like(alpha)
    grad = grads[0].to(wide)
    for i in range(alpha.shape[1]):
        a = alpha[:, i, :, None].to(wide)
        dlayers[:, i] = grad * a
        dalpha[:, i] = (grad * (layers[:, i].to(wide) - behind.pop())).sum(-1)
        grad = grad * (1 - a)
    dlayers[:, -1] = grad
    return [dlayers, dalpha]
