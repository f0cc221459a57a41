"""Contract of atlas_sample: schema, fake, checks and the public function. Imports torch only."""

from __future__ import annotations

from torch import Tensor

from tvkernels._dispatch import Op


def _fake(atlas, uv):
    return atlas.new_empty((*uv.shape[:2], atlas.shape[3]))


OP = Op(
    "atlas_sample",
    "Tensor atlas, Tensor uv",
    "Tensor",
    _fake,
    backends=("triton", "cpu", "reference"),
    differentiable=(0, 1),
)


def atlas_sample(atlas: Tensor, uv: Tensor, *, backend: str = "auto") -> Tensor:
    """Bilinear lookup of atlases by UV. Source: StableVideo, eq. 2.

    Args:
        atlas: [B, H, W, C], any strides, at least one texel.
        uv: [B, P, 2] of atlas's dtype, (u, v) in [-1, 1], u along W; outside, the border's colour.
        backend: "auto" or a name; a named backend never falls back.
    Returns:
        [B, P, C] of atlas's dtype; half inputs are computed in float32. Gradients reach both; that
        of a clamped u or v is zero.
    Raises:
        ValueError: shapes or dtypes do not fit; the text says how.
        BackendError: no backend, or not the named one, can run this call.
    """
    if atlas.dim() != 4 or not atlas.shape[1] * atlas.shape[2]:
        raise ValueError(f"atlas is [B, H, W, C] of at least one texel, got {tuple(atlas.shape)}")
    if uv.dim() != 3 or uv.shape[2] != 2 or uv.shape[0] != atlas.shape[0]:
        raise ValueError(f"uv is [{atlas.shape[0]}, P, 2] for this atlas, got {tuple(uv.shape)}")
    if atlas.dtype != uv.dtype or not atlas.is_floating_point():
        raise ValueError(f"atlas and uv need one floating dtype, got {atlas.dtype} and {uv.dtype}")
    return OP(atlas, uv, backend=backend)
