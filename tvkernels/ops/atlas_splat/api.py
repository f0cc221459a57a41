"""Contract of atlas_splat: schema, fake, checks and the public function. Imports torch only."""

from __future__ import annotations

import torch
from torch import Tensor

from tvkernels._dispatch import Op


def _fake(values, uv, weight, height, width):
    shape = (values.shape[0], height, width)
    return values.new_empty((*shape, values.shape[2])), values.new_empty(shape)


OP = Op(
    "atlas_splat",
    "Tensor values, Tensor uv, Tensor? weight, SymInt height, SymInt width",
    "(Tensor, Tensor)",
    _fake,
    backends=("triton", "cpu", "reference"),
    differentiable=(0,),
)


def atlas_splat(
    values: Tensor,
    uv: Tensor,
    size: tuple[int, int],
    *,
    weight: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Pixels into an atlas, each texel the mean of what shows it. Source: StableVideo, eq. 5.

    Args:
        values: [B, P, C], any strides.
        uv: [B, P, 2] of values' dtype, as `atlas_sample` takes it; outside, the border texel.
        size: (height, width) of the atlas in texels.
        weight: [B, P] in [0, 1] of values' dtype, how much a point counts; None counts all alike.
    Returns:
        The atlas [B, height, width, C], 0 where nothing falls, and the sum of weights
        [B, height, width] in each texel, of values' dtype; half inputs are summed in float32 or
        finer. Gradients reach values alone: the mapping is fixed while a clip is edited.
    Raises:
        ValueError: shapes or dtypes do not fit; the text says how.
        RuntimeError: uv or weight requires gradients.
        BackendError: no backend, or not the named one, can run this call.
    """
    if values.dim() != 3 or not values.is_floating_point():
        raise ValueError(
            f"values is a floating [B, P, C], got {values.dtype} {tuple(values.shape)}"
        )
    if uv.shape != (*values.shape[:2], 2) or uv.dtype != values.dtype:
        raise ValueError(
            f"uv is {values.dtype} {[*values.shape[:2], 2]} for these values, "
            f"got {uv.dtype} {tuple(uv.shape)}"
        )
    if weight is not None and (weight.shape != uv.shape[:2] or weight.dtype != values.dtype):
        raise ValueError(
            f"weight is {values.dtype} {list(uv.shape[:2])} for these values, "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size is (height, width) of at least one texel, got {tuple(size)}")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (uv, weight)):
        raise RuntimeError("atlas_splat gives uv and weight no gradients: detach them")
    return OP(values, uv, weight, height, width, backend=backend)
