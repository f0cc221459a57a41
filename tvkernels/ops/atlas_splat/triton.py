"""Kernels add values and weights to texels, the same bits every time; then the quotient."""

from __future__ import annotations

import torch

from tvkernels._dispatch import OPS
from tvkernels._triton import support
from tvkernels.ops.atlas_sample.kernels import scatter, unit


def why_not(values, uv, weight, height, width) -> list[str]:
    """Reasons against this call."""
    return support.why_not(values, uv, weight)


def forward(values, uv, weight, height, width):
    """Shapes as in `tvkernels.atlas_splat`."""
    b, p, c = values.shape
    if not b * p * c:
        return values.new_zeros((b, height, width, c)), values.new_zeros((b, height, width))
    cover = _cover(values, uv, weight, height, width)
    scale = unit(values.abs().amax(), p, values)
    sums = scatter("atlas_splat", values, uv, weight, height, width, scale)
    atlas = sums.to(torch.float32) / scale / torch.where(cover > 0, cover, 1).unsqueeze(3)
    return atlas.to(values.dtype), cover.to(values.dtype)


def backward(grads, values, uv, weight, height, width):
    """Exact: the transpose of a sum into texels is a lookup of what each of them got."""
    if grads[0] is None or not values.numel():
        return [torch.zeros_like(values)]
    cover = _cover(values, uv, weight, height, width)
    share = grads[0].to(torch.float32) / torch.where(cover > 0, cover, 1).unsqueeze(3)
    found = OPS["atlas_sample"].backend("triton").forward(share, uv)
    return [(found if weight is None else found * weight.unsqueeze(2)).to(values.dtype)]


def _cover(values, uv, weight, height, width):
    """float32 [B, H, W]: the weight that each texel got."""
    scale = unit(None, values.shape[1], values)
    sums = scatter("atlas_splat", values, uv, weight, height, width, scale, ones=True)
    return sums.squeeze(3).to(torch.float32) / scale
