"""Lean composed PyTorch: the sums are the texels' gradient of one grid sampling."""

from __future__ import annotations

import torch

from tvkernels.ops.atlas_sample.cpu import BILINEAR, BORDER


def why_not(*args) -> list[str]:
    """Composed of torch's own ops: runs on every device."""
    return []


def forward(values, uv, weight, height, width):
    """Shapes as in `tvkernels.atlas_splat`."""
    b, p, c = values.shape
    if not b * p:
        return values.new_zeros((b, height, width, c)), values.new_zeros((b, height, width))
    wide = torch.promote_types(values.dtype, torch.float32)
    ones = values.new_ones((b, p, 1), dtype=wide)
    points = torch.cat([values.to(wide), ones], 2)
    if weight is not None:
        points = points * weight.to(wide)[..., None]
    texels = points.new_zeros((b, c + 1, height, width))
    sums, _ = torch.ops.aten.grid_sampler_2d_backward(
        points.transpose(1, 2)[:, :, None], texels, uv[:, None].to(wide), BILINEAR, BORDER, False,
        [True, False],
    )  # fmt: skip
    cover = sums[:, c]
    atlas = sums[:, :c] / torch.where(cover > 0, cover, 1)[:, None]
    return atlas.permute(0, 2, 3, 1).to(values.dtype).contiguous(), cover.to(values.dtype).clone()


def backward(grads, values, uv, weight, height, width):
    """Exact: the transpose of a sum into texels is a lookup of what each of them got."""
    from tvkernels.ops.atlas_sample.cpu import forward as sample

    if grads[0] is None or not values.numel():
        return [torch.zeros_like(values)]
    wide = torch.promote_types(values.dtype, torch.float32)
    w = None if weight is None else weight.to(wide)
    _, cover = forward(values[..., :0].to(wide), uv.to(wide), w, height, width)
    share = grads[0].to(wide) / torch.where(cover > 0, cover, 1)[..., None]
    found = sample(share, uv.to(wide))
    return [(found if w is None else found * w[..., None]).to(values.dtype)]
