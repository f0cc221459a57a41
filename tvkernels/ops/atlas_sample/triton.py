"""One pass over the points; backward, one that reads for the UV and one that adds to texels."""

from __future__ import annotations

import torch

from tvkernels._triton import support
from tvkernels.ops.atlas_sample.kernels import (
    _sample,
    _uv_gradient,
    over_points,
    scatter,
    strides,
    unit,
)


def why_not(atlas, uv) -> list[str]:
    """Reasons against this call."""
    return support.why_not(atlas, uv)


def forward(atlas, uv):
    """Shapes as in `tvkernels.atlas_sample`."""
    (b, p), (height, width, c) = uv.shape[:2], atlas.shape[1:]
    out = torch.empty((b, p, c), dtype=atlas.dtype, device=atlas.device)
    if out.numel():
        over_points(
            "atlas_sample", _sample, p, b, atlas,
            {
                "atlas": atlas, "uv": uv, "out": out, "channels": c, "height": height,
                "width": width,
            } | strides(atlas=atlas, uv=uv),
        )  # fmt: skip
    return out


def backward(grads, atlas, uv):
    """Exact gradients: texels as the splat's sums, UV by the lookup's slope."""
    (b, p), (height, width, c) = uv.shape[:2], atlas.shape[1:]
    if not (b * p * c):
        return [torch.zeros_like(atlas), torch.zeros_like(uv)]
    grad = grads[0]
    duv = torch.empty((b, p, 2), dtype=uv.dtype, device=uv.device)
    over_points(
        "atlas_sample", _uv_gradient, p, b, atlas,
        {
            "atlas": atlas, "uv": uv, "grad": grad, "duv": duv, "channels": c, "height": height,
            "width": width,
        } | strides(atlas=atlas, uv=uv, grad=grad),
    )  # fmt: skip
    scale = unit(grad.abs().amax(), p, uv)
    sums = scatter("atlas_sample", grad, uv, None, height, width, scale)
    return [(sums.to(torch.float32) / scale).to(atlas.dtype), duv]
