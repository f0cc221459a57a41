"""Lean composed PyTorch: one SDPA over views of the public layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F

MAX_HEADS = 65535  # the fused CUDA kernels put heads on a grid dimension of this limit


def why_not(*args) -> list[str]:
    """Composed of torch's own ops: runs on every device."""
    return []


def forward(q, k, v, scale):
    """Shapes as in `tvkernels.temporal_attention`."""
    if q.numel() == 0:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    n, h = q.shape[2:4]
    q, k, v = (x.permute(0, 2, 3, 1, 4) for x in (q, k, v))
    if n * h > MAX_HEADS:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return out.permute(0, 3, 1, 2, 4).contiguous()
    # Positions and heads as one head dimension stay a view and reach SDPA's fused kernel, which
    # refuses five dimensions: 28 ms against 49 at [2, 8, 1024, 8, 40] in float32, one thread.
    q, k, v = (x.flatten(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.unflatten(1, (n, h)).permute(0, 3, 1, 2, 4).contiguous()
