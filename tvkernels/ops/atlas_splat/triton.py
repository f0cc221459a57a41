"""Two kernels add values and weights to texels, the same bits every time; then the quotient."""

from __future__ import annotations

import torch

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
    scale = unit(None, p, values)
    cover = scatter("atlas_splat", values, uv, weight, height, width, scale, ones=True)
    cover = cover.squeeze(3).to(torch.float32) / scale
    scale = unit(values.abs().amax(), p, values)
    sums = scatter("atlas_splat", values, uv, weight, height, width, scale)
    atlas = sums.to(torch.float32) / scale / torch.where(cover > 0, cover, 1).unsqueeze(3)
    return atlas.to(values.dtype), cover.to(values.dtype)
