"""Attention as diffusers had it when the methods were published, and PyTorch's own beside it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, how: str = "math") -> Tensor:
    """softmax(q k^T / sqrt(D)) v, for each head.

    Args:
        q, k, v: [n, tokens, heads * D].
        heads: of them.
        how: "math" or "sdpa".
    """
    if how == "sdpa":
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    q, k, v = (heads_to_batch(x, heads) for x in (q, k, v))
    return batch_to_heads(torch.bmm(probabilities(q, k), v), heads)


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    """[n, a, D] and [n, b, D] -> [n, a, b]."""
    empty = q.new_empty(q.shape[0], q.shape[1], k.shape[1])
    scores = torch.baddbmm(empty, q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)
    return scores.softmax(-1)


def heads_to_batch(x: Tensor, heads: int) -> Tensor:
    """[n, tokens, heads * D] -> [n * heads, tokens, D]."""
    n, tokens, width = x.shape
    x = x.reshape(n, tokens, heads, width // heads).permute(0, 2, 1, 3)
    return x.reshape(n * heads, tokens, width // heads)


def batch_to_heads(x: Tensor, heads: int) -> Tensor:
    """[n * heads, tokens, D] -> [n, tokens, heads * D]."""
    n, tokens, width = x.shape
    x = x.reshape(n // heads, heads, tokens, width).permute(0, 2, 1, 3)
    return x.reshape(n // heads, tokens, heads * width)


class Attention(nn.Module):
    """Attention with its projections, over itself or a context."""

    how = "math"

    def __init__(self, dim: int, heads: int, context: int | None = None):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context or dim, dim, bias=False)
        self.to_v = nn.Linear(context or dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """[n, tokens, dim], and [n, L, context] for keys and values."""
        context = x if context is None else context
        return self.finish(self.to_q(x), self.to_k(context), self.to_v(context))

    def finish(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """From projected queries, keys and values on."""
        return self.to_out[1](self.to_out[0](attend(q, k, v, self.heads, self.how)))
