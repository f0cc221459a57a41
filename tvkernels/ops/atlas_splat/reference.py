"""The definition: for each of the four corners a sum into the texels, then the quotient."""

from __future__ import annotations

import torch

from tvkernels.ops.atlas_sample.reference import corners


def why_not(*args) -> list[str]:
    """The reference runs everywhere."""
    return []


def forward(values, uv, weight, height, width):
    """Shapes as in `tvkernels.atlas_splat`."""
    wide = torch.promote_types(values.dtype, torch.float32)
    b, _, channels = values.shape
    w = torch.ones_like(uv[..., 0], dtype=wide) if weight is None else weight.to(wide)
    total = torch.zeros((b, height * width, channels), dtype=wide, device=values.device)
    cover = torch.zeros((b, height * width), dtype=wide, device=values.device)
    for place, share in corners(uv.to(wide), height, width):
        share = share * w
        index = place[..., None].expand(-1, -1, channels)
        total = total.scatter_add(1, index, share[..., None] * values.to(wide))
        cover = cover.scatter_add(1, place, share)
    seen = torch.where(cover > 0, cover, 1)
    atlas = (total / seen[..., None]).unflatten(1, (height, width))
    return atlas.to(values.dtype), cover.unflatten(1, (height, width)).to(values.dtype)
