"""Contract of clip_group_norm: schema, fake, checks and the public function. Torch only."""

from __future__ import annotations

from torch import Tensor

from tvkernels._dispatch import Op


def _fake(x, weight, bias, groups, eps, silu):
    return x.new_empty(x.shape)


OP = Op(
    "clip_group_norm",
    "Tensor x, Tensor weight, Tensor bias, SymInt groups, float eps, bool silu",
    "Tensor",
    _fake,
    backends=("cuda", "triton", "native", "cpu", "reference"),
    differentiable=(0, 1, 2),
)


def clip_group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    *,
    eps: float = 1e-5,
    silu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """GroupNorm whose statistics pool over the frames of a clip, with SiLU (Tune-A-Video's code).

    Args:
        x: [B, F, C, h, w], any strides.
        weight, bias: [C] of x's dtype.
        groups: number of groups; divides C.
        eps: added to the variance.
        silu: multiply the result by its sigmoid, in the same pass.
        backend: "auto" or a name; a named backend never falls back.
    Returns:
        [B, F, C, h, w] of x's dtype. Gradients reach x, weight and bias.
    Raises:
        ValueError: shapes or dtypes do not fit; the text says how.
        BackendError: no backend, or not the named one, can run this call.
    """
    if x.dim() != 5:
        raise ValueError(f"x is [B, F, C, h, w], got {tuple(x.shape)}")
    channels = x.shape[2]
    if weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(
            f"weight and bias are [{channels}], one for each channel of x: "
            f"{tuple(weight.shape)}, {tuple(bias.shape)}"
        )
    if groups < 1 or channels % groups:
        raise ValueError(f"{groups} groups do not divide {channels} channels")
    if not x.dtype == weight.dtype == bias.dtype or not x.is_floating_point():
        raise ValueError(
            f"x, weight, bias need one floating dtype, got {x.dtype}, {weight.dtype}, {bias.dtype}"
        )
    return OP(x, weight, bias, groups, eps, silu, backend=backend)
