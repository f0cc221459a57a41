"""Contract of token_map_attention: schema, fake, checks and the public function. Torch only."""

from __future__ import annotations

import torch
from torch import Tensor

from tvkernels._dispatch import Op


def _fake(q, k, v, tokens, scale):
    return q.new_empty(q.shape), q.new_empty((*q.shape[:3], tokens.shape[0]))


OP = Op(
    "token_map_attention",
    "Tensor q, Tensor k, Tensor v, Tensor tokens, float? scale",
    "(Tensor, Tensor)",
    _fake,
    backends=("triton", "native", "cpu", "reference"),
    differentiable=(0, 1, 2),
)


def token_map_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Cross-attention, and the probabilities of chosen text tokens (BLD-AC, eq. 5).

    Args:
        q: [B, F, N, H, D], any strides.
        k, v: [B, L, H, D] of q's dtype, projected from the text once for all frames.
        tokens: int64 [T], positions in the text, 0 <= t < L, on q's device.
        scale: factor of the scores, D**-0.5 if None.
        backend: "auto" or a name; a named backend never falls back.
    Returns:
        out [B, F, N, H, D] and maps [B, F, N, T] of q's dtype: softmax probabilities (over all L
        tokens) of the chosen ones, averaged over heads. Gradients reach q, k and v through both.
    Raises:
        ValueError: shapes or dtypes do not fit; the text says how.
        IndexError: a position in `tokens` lies outside the text (raised on a CPU only).
        BackendError: no backend, or not the named one, can run this call.
    """
    if q.dim() != 5 or k.dim() != 4:
        raise ValueError(
            "q is [B, F, N, H, D] and k, v are [B, L, H, D], "
            f"got {tuple(q.shape)}, {tuple(k.shape)}"
        )
    same = q.shape[0] == k.shape[0] and q.shape[3:] == k.shape[2:]
    if not same or k.shape != v.shape:
        raise ValueError(
            "q, k, v must agree in batch, heads and head dim, k and v in all: "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k, v need one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if k.shape[1] == 0:
        raise ValueError("the text holds no tokens: k and v are [B, 0, H, D]")
    if tokens.dim() != 1 or tokens.dtype != torch.int64:
        raise ValueError(f"tokens is int64 [T], got {tokens.dtype} {tuple(tokens.shape)}")
    return OP(q, k, v, tokens, scale, backend=backend)
