"""Lean composed PyTorch: the probabilities of one frame at a time, used twice and dropped.

One softmax a frame serves both results in 31 ms; SDPA for out and a log-sum-exp for the maps took
56 ms, the whole map at once 37 ms ([1, 4, 1024, 8, 80], 77 tokens, float32, one CPU core).
"""

from __future__ import annotations

import torch
from torch import Tensor


def why_not(*args) -> list[str]:
    """Composed of torch's own ops: runs on every device."""
    return []


def forward(q, k, v, tokens, scale):
    """Shapes as in `tvkernels.token_map_attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.numel() == 0:
        return q.new_zeros(q.shape), q.new_zeros((*q.shape[:3], tokens.shape[0]))
    if torch._guards.detect_fake_mode() is not None:  # a loop would fix F in an exported file
        out, maps = _frame(q.flatten(1, 2), k, v, tokens, scale)
        maps = maps.reshape(*q.shape[:3], tokens.shape[0])
        return out.reshape(q.shape).contiguous(), maps.contiguous()
    parts = [_frame(frame, k, v, tokens, scale) for frame in q.unbind(1)]
    outs, maps = zip(*parts, strict=True)
    return torch.stack(outs, 1), torch.stack(maps, 1)


def _frame(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, scale: float):
    """Out [B, N, H, D] and maps [B, N, T] of one frame's q; in float32 for half inputs."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.transpose(1, 2).to(wide) * scale) @ k.permute(0, 2, 3, 1).to(wide)
    probabilities = scores.softmax(-1)
    out = (probabilities @ v.transpose(1, 2).to(wide)).transpose(1, 2)
    return out.to(q.dtype), probabilities[..., tokens].mean(1).to(q.dtype)


def backward(grads, q, k, v, tokens, scale):
    """Exact gradients with the probabilities of one frame at a time."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = torch.zeros_like(q)
    dk, dv = (torch.zeros_like(x, dtype=wide) for x in (k, v))  # sums over all frames
    for f, frame in enumerate(q.unbind(1) if q.numel() else ()):
        leaves = [x.detach().requires_grad_() for x in (frame, k, v)]
        with torch.enable_grad():
            results = _frame(*leaves, tokens, scale)
        pairs = [(r, g[:, f]) for r, g in zip(results, grads, strict=True) if g is not None]
        outs, outer = zip(*pairs, strict=True)
        found = torch.autograd.grad(outs, leaves, outer, allow_unused=True)
        for total, part in zip((dq[:, f], dk, dv), found, strict=True):
            if part is not None:  # v does not reach the maps
                total += part
    return [dq, dk.to(k.dtype), dv.to(v.dtype)]
