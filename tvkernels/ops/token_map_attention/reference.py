"""The definition: the whole map of every frame, head and word, then the chosen columns."""

from __future__ import annotations

import torch


def why_not(*args) -> list[str]:
    """The reference runs everywhere."""
    return []


def forward(q, k, v, tokens, scale):
    """Shapes as in `tvkernels.token_map_attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    probabilities = (torch.einsum("bfnhd,blhd->bfhnl", q, k) * scale).softmax(-1)
    out = torch.einsum("bfhnl,blhd->bfnhd", probabilities, v).contiguous()
    return out, probabilities[..., tokens].mean(2).contiguous()
