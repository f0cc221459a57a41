"""Contract of latent_blend: schema, fake, checks and the public function. Imports torch only."""

from __future__ import annotations

from torch import Tensor

from tvkernels._dispatch import Op, exporting
from tvkernels.ops.guided_ddim_step.api import check_blend


def _fake(foreground, background, mask):
    return None


OP = Op(
    "latent_blend",
    "Tensor(a!) foreground, Tensor background, Tensor mask",
    "()",
    _fake,
    backends=("triton", "cpu", "reference"),
)


def latent_blend(
    foreground: Tensor, background: Tensor, mask: Tensor, *, backend: str = "auto"
) -> Tensor:
    """``foreground = foreground * mask + background * (1 - mask)``, in place (BLD-AC, eq. 3).

    Args:
        foreground: latents of the edit, [B, ...], any strides; overwritten.
        background: latents of the source at the same noise level, foreground's shape and dtype.
        mask: bool or in [0, 1], broadcast to foreground's shape; 1 keeps the foreground.
        backend: "auto" or a name; a named backend never falls back.
    Returns:
        foreground itself. Half inputs are computed in float32.
    Raises:
        ValueError: shapes or dtypes do not fit; the text says how.
        RuntimeError: an input requires gradients, which this op does not have.
        BackendError: no backend, or not the named one, can run this call.
    """
    if not foreground.is_floating_point():
        raise ValueError(f"foreground is a floating tensor, got {foreground.dtype}")
    check_blend(foreground, background, mask)
    if exporting():  # it wraps a mutating op in a node that cannot decompose
        OP.backend("cpu").forward(foreground, background, mask)
    else:
        OP(foreground, background, mask, backend=backend)
    return foreground
