"""Contract of temporal_conv: schema, fake, checks and the public function. Torch only."""

from __future__ import annotations

from torch import Tensor

from tvkernels._dispatch import Op


def _fake(x, weight, bias, norm_weight, norm_bias, residual, groups, eps, stride, frames):
    b, _, _, h, w = x.shape
    return x.new_empty(b, (frames - 1) // stride + 1, weight.shape[0], h, w)


OP = Op(
    "temporal_conv",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? residual, SymInt groups, float eps, SymInt stride, SymInt frames",
    "Tensor",
    _fake,
    backends=("triton", "native", "cpu", "reference"),
    differentiable=(0, 1, 2, 3, 4, 5),
)


def temporal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    groups: int = 32,
    eps: float = 1e-5,
    stride: int = 1,
    frames: int | None = None,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Group norm over frames, SiLU, 1-D convolution over frames, residual.

    Source: TCVE, section IV-B, and its released code.

    Args:
        x: [B, F, C, h, w], any strides.
        weight: [O, C, K] of x's dtype, K odd; zeros stand where the clip has no frame.
        bias: [O].
        norm_weight, norm_bias: [C], of a group norm before the convolution, whose statistics are
            of each position's own group channels and F frames, with SiLU after it; without them
            neither.
        groups, eps: of the norm; groups divides C.
        stride: over frames, 1 or more; halving rounds up.
        frames: length that the convolution sees, nearest frames standing for each other; F if
            None.
        residual: [B, F', O, h, w], added to the result.
        backend: "auto" or a name; a named backend never falls back.
    Returns:
        [B, F', O, h, w], contiguous, F' = ceil(frames / stride). Gradients reach all tensors.
    Raises:
        ValueError: shapes or dtypes do not fit; the text says how.
        BackendError: no backend, or not the named one, can run this call.
    """
    if x.dim() != 5:
        raise ValueError(f"x is [B, F, C, h, w], got {tuple(x.shape)}")
    if weight.dim() != 3 or weight.shape[1] != x.shape[2] or weight.shape[2] % 2 != 1:
        raise ValueError(
            f"weight is [O, {x.shape[2]}, K] with K odd, for the channels of x: "
            f"{tuple(weight.shape)}"
        )
    length = x.shape[1] if frames is None else frames
    if stride < 1 or length < 0 or (length and not x.shape[1]):
        raise ValueError(f"stride {stride} over {length} frames of a clip of {x.shape[1]}")
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight and norm_bias go together")
    _check_channels("bias", bias, weight.shape[0])
    _check_channels("norm_weight", norm_weight, x.shape[2])
    _check_channels("norm_bias", norm_bias, x.shape[2])
    if norm_weight is not None and (groups < 1 or x.shape[2] % groups):
        raise ValueError(f"{groups} groups do not divide {x.shape[2]} channels")
    out = (x.shape[0], (length - 1) // stride + 1, weight.shape[0], *x.shape[3:])
    if residual is not None and residual.shape != out:
        raise ValueError(f"residual is the result's {out}, got {tuple(residual.shape)}")
    tensors = [t for t in (x, weight, bias, norm_weight, norm_bias, residual) if t is not None]
    dtypes = list(dict.fromkeys(t.dtype for t in tensors))
    if len(dtypes) > 1 or not x.is_floating_point():
        raise ValueError(f"all tensors need one floating dtype, got {', '.join(map(str, dtypes))}")
    return OP(
        x, weight, bias, norm_weight, norm_bias, residual, groups, eps, stride, length,
        backend=backend,
    )  # fmt: skip


def _check_channels(name: str, vector: Tensor | None, channels: int) -> None:
    if vector is not None and vector.shape != (channels,):
        raise ValueError(f"{name} is [{channels}], got {tuple(vector.shape)}")
