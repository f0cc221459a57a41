"""Contract of atlas_composite: schema, fake, checks, public function. Imports torch only."""

from __future__ import annotations

from torch import Tensor

from tvkernels._dispatch import Op


def _fake(layers, alpha):
    return layers.new_empty((layers.shape[0], *layers.shape[2:]))


OP = Op(
    "atlas_composite",
    "Tensor layers, Tensor alpha",
    "Tensor",
    _fake,
    backends=("triton", "cpu", "reference"),
    differentiable=(0, 1),
)


def atlas_composite(layers: Tensor, alpha: Tensor, *, backend: str = "auto") -> Tensor:
    """Foreground layers over the background, pixel by pixel. Source: StableVideo, eq. 3.

    Args:
        layers: [B, L, P, C] of colours, from the front to the background, any strides.
        alpha: [B, L - 1, P] opacity of the foregrounds, of layers' dtype.
        backend: "auto" or a name; a named backend never falls back.
    Returns:
        [B, P, C] of layers' dtype; half inputs are computed in float32. Gradients reach both.
    Raises:
        ValueError: shapes or dtypes do not fit; the text says how.
        BackendError: no backend, or not the named one, can run this call.
    """
    if layers.dim() != 4 or not layers.shape[1]:
        raise ValueError(f"layers is [B, L, P, C] with L of 1 or more, got {tuple(layers.shape)}")
    b, count, p, _ = layers.shape
    if alpha.shape != (b, count - 1, p):
        raise ValueError(
            f"alpha is {[b, count - 1, p]}, one for each layer before the background, "
            f"got {tuple(alpha.shape)}"
        )
    if layers.dtype != alpha.dtype or not layers.is_floating_point():
        raise ValueError(
            f"layers and alpha need one floating dtype, got {layers.dtype} and {alpha.dtype}"
        )
    return OP(layers, alpha, backend=backend)
