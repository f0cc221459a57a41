"""The definition: every frame's keys and values concatenated, one softmax. Plain PyTorch."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tvkernels.patterns import pooled_counts


def why_not(*args) -> list[str]:
    """The reference runs everywhere."""
    return []


def forward(q, k, v, row_ptr, segments, levels, h, w, scale, return_lse):
    """Shapes as in `tvkernels.frame_attention`; keys and values of all frames are gathered."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    sources = {0: (k, v)}
    for level in filter(None, levels):
        sources[level] = (pool(k, h, w, level), pool(v, h, w, level))
    ends, rows = row_ptr.tolist(), segments.tolist()
    keys, values, biases = [], [], []
    for first, last in pairwise(ends):
        key, value, bias = [], [], []
        for frame, level, count, sized in rows[first:last]:
            tokens = sources[level][0].shape[2]
            size = pooled_counts((h, w), level) if sized else torch.ones(tokens)
            for _ in range(count):
                key.append(sources[level][0][:, frame])
                value.append(sources[level][1][:, frame])
                bias.append(size.log())
        keys.append(torch.cat(key, 1))
        values.append(torch.cat(value, 1))
        biases.append(torch.cat(bias).to(q))
    outs, lses = [], []
    for f in range(q.shape[1]):
        scores = torch.einsum("bnhd,bmhd->bhnm", q[:, f], keys[f]) * scale + biases[f]
        outs.append(torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), values[f]))
        lses.append(scores.logsumexp(-1).transpose(1, 2))
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.stack(outs, 1) if outs else torch.empty_like(q)
    if not return_lse:
        return out, q.new_empty(0, dtype=wide)
    lse = torch.stack(lses, 1).to(wide) if lses else q.new_empty(q.shape[:-1], dtype=wide)
    return out, lse


def pool(x: Tensor, h: int, w: int, level: int) -> Tensor:
    """[B, F, h * w, H, D] averaged level x level, ragged edges over what is there."""
    b, f, _, heads, d = x.shape
    images = x.reshape(b * f, h, w, heads * d).permute(0, 3, 1, 2)
    images = F.avg_pool2d(images, level, ceil_mode=True, count_include_pad=False)
    return images.flatten(2).transpose(1, 2).reshape(b, f, -1, heads, d)
