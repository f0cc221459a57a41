"""Contract of instance_center: schema, fake, checks, public function. Imports torch only."""

from __future__ import annotations

from torch import Tensor

from tvkernels._dispatch import Op


def _fake(z):
    return z.new_empty(z.shape)


OP = Op(
    "instance_center",
    "Tensor z",
    "Tensor",
    _fake,
    backends=("triton", "cpu", "reference"),
    differentiable=(0,),
)


def instance_center(z: Tensor, *, backend: str = "auto") -> Tensor:
    """z minus its mean over frames, per position and channel (EI2, eq. 6).

    Args:
        z: [B, F, N, C], floating, any strides.
        backend: "auto" or a name; a named backend never falls back.
    Returns:
        [B, F, N, C], contiguous; its mean over frames is zero to rounding.
    Raises:
        ValueError: z has other dimensions or no floating dtype.
        BackendError: no backend, or not the named one, can run this call.
    """
    if z.dim() != 4:
        raise ValueError(f"z is [B, F, N, C], got {tuple(z.shape)}")
    if not z.is_floating_point():
        raise ValueError(f"z needs a floating dtype, got {z.dtype}")
    return OP(z, backend=backend)
