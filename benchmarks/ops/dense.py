"""An attention op as other libraries take it: plain attention over copies laid end to end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tvkernels._dispatch import OPS
from tvkernels.patterns import FramePattern, FrameTable, Segment
from tvkernels.testing.spec import OpSpec


class Unfit(ValueError):
    """Why a provider cannot express a call."""


@dataclass(frozen=True)
class Dense:
    """Plain attention that stands for a call.

    Args:
        gather: positional arguments of the public function -> q [B', N, H, D] and k, v
            [B', M, H, D].
        back: [B', N, H, D] -> the op's first result in its public layout, contiguous.
        copies: whether `gather` or `back` moves anything.
        only_first: the op has results that this leaves out.
    """

    gather: Callable[..., tuple[Tensor, Tensor, Tensor]]
    back: Callable[[Tensor], Tensor]
    scale: float
    copies: bool
    only_first: bool = False


def dense(spec: OpSpec, args) -> Dense:
    """The plain attention that stands for a call of an op in `ATTENTION`.

    Raises:
        Unfit: there is none.
    """
    return ATTENTION[spec.name](*args[0], **args[1])


def rows_of(pattern: FramePattern | FrameTable, frames: int) -> list[list[Segment]]:
    """The segments that each query frame reads.

    Raises:
        Unfit: pooled tokens weigh by their size.
    """
    if isinstance(pattern, FrameTable):
        read = OPS["frame_attention"].backend("cpu").read_table
        rows, sized = read(pattern.row_ptr, pattern.segments)
    else:
        rows, sized = pattern.segments(frames), pattern.size_bias
    if sized:
        raise Unfit("pooled tokens weigh by their size, which plain attention does not know")
    return rows


def even(rows: list[list[Segment]]) -> list[list[Segment]]:
    """The rows as published code lays them out: every one as long as the others.

    A row of full frames that is too short is repeated whole, which changes no result: the first
    frame under [0; f - 1] reads itself twice.

    Raises:
        Unfit: rows of different kinds, or weights that no repetition gives.
    """
    rows = [
        sorted((Segment(s.frame, s.level) for s in row for _ in range(s.count)), key=_fine_first)
        for row in rows
    ]
    longest = max(map(len, rows))
    for i, row in enumerate(rows):
        times, rest = divmod(longest, len(row))
        if not rest and not any(s.level for s in row):
            rows[i] = row * times
    if len({tuple(s.level for s in row) for row in rows}) > 1:
        raise Unfit("its frames read different numbers of keys")
    return rows


def _fine_first(segment: Segment) -> int:
    return segment.level


def _frame_attention(q, k, v, pattern, *, grid, scale=None, return_lse=False) -> Dense:
    if not q.numel():
        raise Unfit("there is nothing to attend to")
    rows = even(rows_of(pattern, k.shape[1]))
    own = rows == [[Segment(f)] for f in range(k.shape[1])]
    picks: dict[int, Tensor] = {}
    for level in dict.fromkeys(s.level for s in rows[0]):
        picked = [[s.frame for s in row if s.level == level] for row in rows]
        picks[level] = torch.tensor(picked, device=k.device)
    pool = OPS["frame_attention"].backend("reference").pool

    def gathered(x: Tensor) -> Tensor:
        if own:
            return x.flatten(0, 1)
        parts = [
            (pool(x, *grid, level) if level else x)[:, pick].flatten(2, 3)
            for level, pick in picks.items()
        ]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        return joined.flatten(0, 1)

    return Dense(
        lambda q, k, v, *_: (q.flatten(0, 1), gathered(k), gathered(v)),
        lambda out: out.reshape(q.shape).contiguous(),
        q.shape[-1] ** -0.5 if scale is None else scale,
        copies=not own,
        only_first=return_lse,
    )


def _temporal_attention(q, k, v, *, scale=None) -> Dense:
    b, frames, n, heads, d = q.shape

    def gather(*given: Tensor):
        return tuple(x.transpose(1, 2).reshape(b * n, frames, heads, d) for x in given)

    return Dense(
        gather,
        lambda out: out.reshape(b, n, frames, heads, d).transpose(1, 2).contiguous(),
        d**-0.5 if scale is None else scale,
        copies=True,
    )


def _token_map_attention(q, k, v, tokens, *, scale=None) -> Dense:
    return Dense(
        lambda q, k, v, *_: (q.flatten(1, 2), k, v),
        lambda out: out.reshape(q.shape).contiguous(),
        q.shape[-1] ** -0.5 if scale is None else scale,
        copies=False,
        only_first=True,
    )


def _stam(z, w_q, w_k, w_v, w_out, bias=None, *, heads, sigma_v=None, sigma_out=None) -> Dense:
    b, frames, n, c = z.shape
    normalised = OPS["spectral_linear"].backend("reference").normalised
    trained = w_v.requires_grad or w_out.requires_grad
    # Folded once, as one would for inference; in training each call has a graph of its own.
    folded = None if trained else (normalised(w_v, sigma_v), normalised(w_out, sigma_out))

    def gather(z, *_):
        weights = w_q, w_k, normalised(w_v, sigma_v) if trained else folded[0]
        clips = z.transpose(1, 2).reshape(b * n, frames, c)
        centered = clips - clips.mean(1, keepdim=True)
        return tuple(F.linear(centered, w).unflatten(-1, (heads, -1)) for w in weights)

    def back(out):
        last = normalised(w_out, sigma_out) if trained else folded[1]
        attended = F.linear(out.flatten(2), last, bias)
        return (z + attended.reshape(b, n, frames, c).transpose(1, 2)).contiguous()

    return Dense(gather, back, (c // heads) ** -0.5, copies=True)


ATTENTION = {
    "frame_attention": _frame_attention,
    "temporal_attention": _temporal_attention,
    "token_map_attention": _token_map_attention,
    "shift_restricted_temporal_attention": _stam,
}
