"""Contract of temporal_attention: schema, fake, checks, public function. Imports torch only."""

from __future__ import annotations

from torch import Tensor

from tvkernels._dispatch import Op


def _fake(q, k, v, scale):
    return q.new_empty(q.shape)


OP = Op(
    "temporal_attention",
    "Tensor q, Tensor k, Tensor v, float? scale",
    "Tensor",
    _fake,
    backends=("cuda", "triton", "native", "cpu", "reference"),
    differentiable=(0, 1, 2),
)


def temporal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Full attention over the frames at each token position (Tune-A-Video's temporal attention).

    Args:
        q, k, v: [B, F, N, H, D] of one floating dtype, any strides.
        scale: factor of the scores, D**-0.5 if None.
        backend: "auto" or a name; a named backend never falls back.
    Returns:
        [B, F, N, H, D], contiguous.
    Raises:
        ValueError: shapes or dtypes do not fit; the text says how.
        BackendError: no backend, or not the named one, can run this call.
    """
    if q.dim() != 5 or not q.shape == k.shape == v.shape:
        raise ValueError(
            "q, k, v share one shape [B, F, N, H, D], got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k, v need one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    return OP(q, k, v, scale, backend=backend)
