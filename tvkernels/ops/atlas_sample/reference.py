"""The definition: the four texels around each UV, weighted by their nearness, and summed."""

from __future__ import annotations

import torch
from torch import Tensor


def why_not(*args) -> list[str]:
    """The reference runs everywhere."""
    return []


def forward(atlas, uv):
    """Shapes as in `tvkernels.atlas_sample`."""
    wide = torch.promote_types(atlas.dtype, torch.float32)
    height, width, channels = atlas.shape[1:]
    texels = atlas.to(wide).reshape(len(atlas), height * width, channels)
    out = 0
    for place, weight in corners(uv.to(wide), height, width):
        index = place[..., None].expand(-1, -1, channels)
        out = out + texels.gather(1, index) * weight[..., None]
    return out.to(atlas.dtype)


def corners(uv: Tensor, height: int, width: int) -> list[tuple[Tensor, Tensor]]:
    """Number of the texel, int64 [B, P], and its weight [B, P], for each of the four around uv."""
    x = (((uv[..., 0] + 1) * width - 1) / 2).clamp(0, width - 1)
    y = (((uv[..., 1] + 1) * height - 1) / 2).clamp(0, height - 1)
    left, top = x.detach().floor(), y.detach().floor()
    found = []
    for row, below in ((top, 0), (top + 1, 1)):
        for column, right in ((left, 0), (left + 1, 1)):
            weight_x = x - left if right else 1 - (x - left)
            weight_y = y - top if below else 1 - (y - top)
            # The corner beyond the border has weight zero.
            place = row.clamp(max=height - 1) * width + column.clamp(max=width - 1)
            found.append((place.long(), weight_x * weight_y))
    return found
