"""Lean composed PyTorch: the keys and values of one frame at a time, or none copied at all.

Under export those of all frames at once: a loop would be written out once for each frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tvkernels._dispatch import exporting
from tvkernels.ops.frame_attention.reference import pool
from tvkernels.patterns import FramePattern, Segment, pooled_counts

Rows = list[list[Segment]]
Lists = list[list[int]]
SCORES = 2**22  # scores the backward holds at a time: 16 MiB, whatever the picture's size


def why_not(*args) -> list[str]:
    """Composed of torch's own ops: runs on every device."""
    return []


def forward(q, k, v, row_ptr, segments, levels, h, w, scale, return_lse):
    """Shapes as in `tvkernels.frame_attention`."""
    rows, sized = read_table(row_ptr, segments)
    return attend(q, k, v, rows, sized, (h, w), scale, return_lse)


def plan(pattern: FramePattern, num_frames: int) -> tuple[Rows, bool]:
    """The pattern in Python: what export needs, where a tensor cannot become slices."""
    return pattern.segments(num_frames), pattern.size_bias


def read_table(row_ptr: Tensor, segments: Tensor) -> tuple[Rows, bool]:
    """The rows of a compiled table, and whether its pooled tokens weigh log(pooled count)."""
    ends, flat = row_ptr.tolist(), segments.tolist()
    rows = [[Segment(*s[:3]) for s in flat[first:last]] for first, last in pairwise(ends)]
    return rows, any(s[3] for s in flat)


def attend(q, k, v, rows: Rows, sized: bool, grid, scale, return_lse):
    """Frames that read one list share one call; others gather one frame's keys at a time."""
    if exporting():
        rows = [sorted(row) for row in rows]  # so that those that read the same frames share
    source = Source(k, v, rows, grid, sized)
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.numel() == 0:
        out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(q.shape[:-1])
    elif rows == [[Segment(f)] for f in range(k.shape[1])]:
        out, lse = _sdpa(*(x.flatten(0, 1) for x in (q, k, v)), None, scale, return_lse)
    elif all(row == rows[0] for row in rows):
        out, lse = _sdpa(q.flatten(1, 2), *source.gather(rows[0]), scale, return_lse)
    elif exporting() and (lists := _even(rows)) is not None:
        # One attention: 32 in place of 256 in Tune-A-Video's demo UNet of 8 frames.
        pair = source.gather_all(lists)
        out, lse = _sdpa(q.flatten(0, 1), *pair, source.bias(lists), scale, return_lse)
    else:
        parts = [
            _sdpa(q[:, f], *source.gather(row), scale, return_lse) for f, row in enumerate(rows)
        ]
        out = torch.stack([part[0] for part in parts], 1)
        lse = torch.stack([part[1] for part in parts], 1) if return_lse else None
    out = out.reshape(q.shape).contiguous()
    if return_lse:
        return out, lse.reshape(q.shape[:-1]).to(wide).contiguous()
    return out, q.new_empty(0, dtype=wide)


class Source:
    """Keys and values of all frames, pooled once per level, read one row at a time.

    k and v are already projected: averaging commutes with an affine map, so coarse tokens cost no
    projection.
    """

    def __init__(self, k: Tensor, v: Tensor, rows: Rows, grid, sized: bool):
        self.levels = {0: (k, v, None)}
        for level in sorted({s.level for row in rows for s in row} - {0}):
            weight = pooled_counts(grid, level).log().to(k) if sized else None
            self.levels[level] = (pool(k, *grid, level), pool(v, *grid, level), weight)

    def gather(self, row: list[Segment]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values [B, M, H, D] and the bias [M] (None where it is zero) of one frame."""
        keys = [self.levels[s.level][0][:, s.frame] for s in row]
        values = [self.levels[s.level][1][:, s.frame] for s in row]
        if len(row) == 1:
            return keys[0], values[0], self.levels[row[0].level][2]
        bias = None
        if any(s.count > 1 or self.levels[s.level][2] is not None for s in row):
            parts = []
            for s, key in zip(row, keys, strict=True):
                weight = self.levels[s.level][2]
                zero = key.new_zeros(key.shape[1]) if weight is None else weight
                parts.append(zero + math.log(s.count))
            bias = torch.cat(parts)
        return torch.cat(keys, 1), torch.cat(values, 1), bias

    def gather_all(self, lists: dict[int, Lists]) -> tuple[Tensor, Tensor]:
        """Keys and values [B * F, M, H, D] of every query frame, by slices and expands alone."""
        keys, values = (
            [_frames(self.levels[level][i], frames) for level, frames in lists.items()]
            for i in (0, 1)
        )
        return torch.cat(keys, 2).flatten(0, 1), torch.cat(values, 2).flatten(0, 1)

    def bias(self, lists: dict[int, Lists]) -> Tensor | None:
        """The bias [M] of every frame of `gather_all`, None where it is zero."""
        if all(self.levels[level][2] is None for level in lists):
            return None
        parts = []
        for level, frames in lists.items():
            key, _, weight = self.levels[level]
            zero = key.new_zeros(key.shape[2])
            parts += [zero if weight is None else weight] * len(frames[0])
        return torch.cat(parts)


def _even(rows: Rows) -> dict[int, Lists] | None:
    """Level -> each query frame's list of frames, as many for all of them.

    A shorter row is repeated, which changes nothing in a softmax; None where that does not help.
    """
    found = []
    for row in rows:
        levels: dict[int, list[int]] = {}
        for s in row:
            levels.setdefault(s.level, []).extend([s.frame] * s.count)
        found.append(levels)
    sizes = [sum(map(len, levels.values())) for levels in found]
    found = [
        {level: frames * (max(sizes) // size) for level, frames in levels.items()}
        for levels, size in zip(found, sizes, strict=True)
    ]
    shapes = [{level: len(frames) for level, frames in levels.items()} for levels in found]
    if any(shape != shapes[0] for shape in shapes):
        return None
    return {level: [levels[level] for levels in found] for level in shapes[0]}


def _frames(x: Tensor, lists: Lists) -> Tensor:
    """[B, F, n, H, D] -> [B, Q, m * n, H, D]: query frame f's tokens are those of m frames."""
    count = x.shape[1]
    if lists == [[j for j in range(count) if j != f] for f in range(count)]:
        # Without its first entry a table of F rows is F - 1 rows of F + 1, the last of which are
        # the diagonal: five operators for any number of frames.
        table = x.flatten(2).unsqueeze(1).expand(-1, count, -1, -1).flatten(1, 2)[:, 1:]
        table = table.unflatten(1, (count - 1, count + 1))[:, :, :-1]
        return table.reshape(x.shape[0], count, (count - 1) * x.shape[2], *x.shape[3:])
    return torch.cat([_runs(x, column) for column in zip(*lists, strict=True)], 2)


def _runs(x: Tensor, frames: Sequence[int]) -> Tensor:
    """x[:, frames] by slices of successive frames and expands of repeated ones."""
    parts, first = [], 0
    while first < len(frames):
        frame, last = frames[first], first + 1
        step = frames[last] - frame if last < len(frames) else 1
        while step in (0, 1) and last < len(frames) and frames[last] - frames[last - 1] == step:
            last += 1
        if step == 0:
            parts.append(x[:, frame : frame + 1].expand(-1, last - first, -1, -1, -1))
        else:
            parts.append(x[:, frame : frame + last - first])
        first = last
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _sdpa(q, k, v, bias, scale, return_lse):
    """[B, N, H, D] queries over [B, M, H, D]; the log-sum-exp only where asked for."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if bias is None else bias.expand(q.shape[0], 1, q.shape[2], -1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
    if not return_lse:
        return out, None
    scores = (q @ k.transpose(2, 3)) * scale
    scores = scores if bias is None else scores + bias
    return out, scores.logsumexp(-1).transpose(1, 2)


def backward(grads, q, k, v, row_ptr, segments, levels, h, w, scale, return_lse):
    """Exact gradients in closed form, with the gathered keys of one query frame at a time."""
    rows, sized = read_table(row_ptr, segments)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    source = Source(k, v, rows, (h, w), sized)
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = torch.zeros_like(q)
    summed = {
        level: [torch.zeros_like(x, dtype=wide) for x in pair[:2]]
        for level, pair in source.levels.items()
    }
    for f, row in enumerate(rows if q.numel() else ()):
        # A compiler also sends the empty gradient of a log-sum-exp that was not asked for.
        outer = [None if g is None or not g.numel() else g[:, f] for g in grads]
        dq[:, f] = _backward_frame(outer, q[:, f], source, row, summed, scale)
    dk, dv = summed.pop(0)
    for level, (dkey, dvalue) in summed.items():
        dk += _unpool(dkey, k, h, w, level)
        dv += _unpool(dvalue, v, h, w, level)
    return [dq, dk.to(k.dtype), dv.to(v.dtype)]


def _backward_frame(grads, q, source: Source, row, summed, scale) -> Tensor:
    """One frame's dq; its dk and dv join `summed`.

    Written out, since the backward of torch's own flash kernel for CPUs rounds more than plain
    PyTorch: 17 steps against 2.4, the worst of 32 float32 draws.
    """
    key, value, bias = source.gather(row)
    wide = summed[0][0].dtype
    # Dense by head once, or every product below would copy them again.
    q, key, value = (x.transpose(1, 2).to(wide).contiguous() for x in (q, key, value))
    g_out = q.new_zeros(()).expand_as(q) if grads[0] is None else grads[0].transpose(1, 2).to(wide)
    g_lse = q.new_zeros(()).expand(q.shape[:3]) if grads[1] is None else grads[1].transpose(1, 2)
    dkey, dvalue, dq = torch.zeros_like(key), torch.zeros_like(value), []
    tokens = max(1, SCORES // (q.shape[0] * q.shape[1] * key.shape[2]))
    parts = zip(*(x.split(tokens, 2) for x in (q, g_out, g_lse)), strict=True)
    for query, outer, outer_lse in parts:
        scores = (query @ key.transpose(2, 3)) * scale
        weights = (scores if bias is None else scores + bias).softmax(-1)
        dvalue += weights.transpose(2, 3) @ outer
        slope = outer @ value.transpose(2, 3)
        slope -= (slope * weights).sum(-1, keepdim=True) - outer_lse.unsqueeze(-1)
        slope *= weights
        dq.append(slope @ key * scale)
        dkey += slope.transpose(2, 3) @ query * scale
    sizes = [source.levels[s.level][0].shape[2] for s in row]
    for total, part in enumerate((dkey, dvalue)):
        for segment, piece in zip(row, part.transpose(1, 2).split(sizes, 1), strict=True):
            summed[segment.level][total][:, segment.frame] += piece
    return torch.cat(dq, 2).transpose(1, 2).to(source.levels[0][0].dtype)


def _unpool(grad: Tensor, x: Tensor, h: int, w: int, level: int) -> Tensor:
    """The adjoint of `pool`."""
    x = torch.zeros_like(x, dtype=grad.dtype).requires_grad_()
    with torch.enable_grad():
        pooled = pool(x, h, w, level)
    return torch.autograd.grad(pooled, x, grad)[0]
