"""Which frames, and at which resolution, each frame of a clip reads: data, not code.

A pattern gives every query frame a list of segments ``(frame, level, count)``: ``level`` 0 is full
resolution, ``level`` r the frame's tokens average-pooled r x r, ``count`` how often the frame is
named (a frame named twice counts twice, as concatenation makes it). `FramePattern.table` compiles
the lists to the tensors every kernel reads.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

MAX_LEVELS = 2  # distinct coarse levels in one table; the literature uses one


class Segment(NamedTuple):
    """One stretch of keys and values: all tokens of `frame` at `level`, counted `count` times."""

    frame: int
    level: int = 0
    count: int = 1


class FrameTable(NamedTuple):
    """A pattern compiled for a clip: tensors of dynamic length, so a new pattern never recompiles.

    Query frame f owns the segments ``row_ptr[f] : row_ptr[f + 1]``.
    """

    row_ptr: Tensor  # int32 [F + 1]
    # int32 [S, 4]: frame, level, count, 1 if pooled tokens weigh log(pooled count)
    segments: Tensor
    # Empty, [0, 2 + r1, 2 + r2, 2 + F]: launchers need the coarse levels on the host without a
    # device read, and sizes are the one kind of number that torch.compile keeps dynamic (0 and 1
    # it would not).
    levels: Tensor

    @property
    def coarse_levels(self) -> list[int]:
        """The coarse levels in use, 0 standing for none; always MAX_LEVELS numbers."""
        return [size - 2 for size in self.levels.shape[1:-1]]

    @property
    def num_frames(self) -> int:
        """Frames of keys and values that the segments' numbers are of."""
        return self.levels.shape[-1] - 2


@dataclass(frozen=True)
class FramePattern:
    """Frames read by frame f: relative `offsets` (clamped), absolute `anchors`, `others`.

    Args:
        offsets: frame numbers relative to f, clamped to [0, F - 1].
        anchors: frame numbers (negative ones count from the end) or "first", "mid", "last".
        others: level at which every frame but f is read; None reads none of them.
        lists: explicit segments for each query frame, in place of the rules above.
        size_bias: add log(pooled count) to the scores of pooled tokens (EI2, eq. 10 has none).
    """

    offsets: tuple[int, ...] = ()
    anchors: tuple[int | str, ...] = ()
    others: int | None = None
    lists: tuple[tuple[Segment, ...], ...] | None = None
    size_bias: bool = False

    @staticmethod
    def own() -> FramePattern:
        """{f}: the plain UNet, StableVideo."""
        return FramePattern(offsets=(0,))

    @staticmethod
    def first() -> FramePattern:
        """{0}: Text2Video-Zero, Video-P2P."""
        return FramePattern(anchors=(0,))

    @staticmethod
    def first_previous() -> FramePattern:
        """{0, f - 1}: Tune-A-Video, TCVE; on cached frames Pix2Video and Rerender."""
        return FramePattern(anchors=(0,), offsets=(-1,))

    @staticmethod
    def previous_own() -> FramePattern:
        """{f - 1, f}: blended latent diffusion under attention control, eq. 6."""
        return FramePattern(offsets=(-1, 0))

    @staticmethod
    def all() -> FramePattern:
        """Every frame: ControlVideo, FLATTEN stage 1, TokenFlow's key frames."""
        return FramePattern(offsets=(0,), others=0)

    @staticmethod
    def fine_coarse(ratio: int, *, size_bias: bool = False) -> FramePattern:
        """{(f, full)} and every other frame pooled ratio x ratio: EI2, eq. 10."""
        if ratio < 2:
            raise ValueError(f"fine_coarse needs a ratio of 2 or more, got {ratio}")
        return FramePattern(offsets=(0,), others=ratio, size_bias=size_bias)

    @staticmethod
    def frames(*, offsets: Sequence[int] = (), anchors: Sequence[int | str] = ()) -> FramePattern:
        """Any list of relative and absolute frames: FateZero ("mid", -1, ...)."""
        return FramePattern(offsets=tuple(offsets), anchors=tuple(anchors))

    @staticmethod
    def rows(lists: Sequence[Sequence[int | tuple[int, int]]]) -> FramePattern:
        """One explicit list for each query frame, of frames or (frame, level): RAVE's grids."""
        segments = tuple(
            tuple(Segment(s) if isinstance(s, int) else Segment(*s) for s in row) for row in lists
        )
        return FramePattern(lists=segments)

    @property
    def is_own(self) -> bool:
        """True where every frame reads itself alone, whatever their number."""
        return self == FramePattern.own()

    def segments(
        self, num_frames: int, queries: Sequence[int] | None = None
    ) -> list[list[Segment]]:
        """The segments of each query frame, repeated frames merged into one with its count.

        Args:
            num_frames: frames that keys and values hold.
            queries: the query frames in that numbering; all of them if None.
        Raises:
            ValueError: a frame outside the clip or a frame that reads nothing; the text names it.
        """
        if self.lists is not None:
            if queries is not None:
                raise ValueError("a pattern of explicit rows already names its query frames")
            return [_merge(list(row), f, num_frames) for f, row in enumerate(self.lists)]
        frames = range(num_frames) if queries is None else queries
        return [_merge(self._rule(f, num_frames), f, num_frames) for f in frames]

    def _rule(self, f: int, num_frames: int) -> list[Segment]:
        last = num_frames - 1
        if not 0 <= f <= last:
            raise ValueError(f"query frame {f} lies outside the clip of {num_frames} frames")
        named = {"first": 0, "mid": last // 2, "last": last}
        row = []
        for anchor in self.anchors:
            if isinstance(anchor, str) and anchor not in named:
                raise ValueError(f"unknown anchor {anchor!r}: use a number or one of {[*named]}")
            frame = named[anchor] if isinstance(anchor, str) else anchor
            row.append(Segment(frame + num_frames if -num_frames <= frame < 0 else frame))
        row += [Segment(min(max(f + offset, 0), last)) for offset in self.offsets]
        if self.others is not None:
            row += [Segment(j, self.others) for j in range(num_frames) if j != f]
        return row

    def table(
        self,
        num_frames: int,
        *,
        queries: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> FrameTable:
        """Compiles the pattern for `num_frames` frames of keys and values; see `segments`."""
        key = (self, num_frames, None if queries is None else tuple(queries))
        device = torch.device(device or "cpu")
        # A table made under a fake or tracing mode must not outlive it.
        if torch.compiler.is_compiling() or _is_fake():
            return _build_table(*key, device)
        return _cached_table(*key, device, "torch._dynamo" in sys.modules)

    def materialize(self, num_frames: int, grid: tuple[int, int]) -> Tensor:
        """The dense additive mask, for tests only: float64 [F, keys], -inf where f does not read.

        Columns are all tokens of every frame at level 0, then at each coarse level in use.
        """
        rows = self.segments(num_frames)
        levels = [0, *sorted({s.level for row in rows for s in row} - {0})]
        sizes = {r: pooled_counts(grid, r) if r else torch.ones(grid).flatten() for r in levels}
        start, column = {}, 0
        for level in levels:
            for frame in range(num_frames):
                start[frame, level], column = column, column + sizes[level].numel()
        mask = torch.full((len(rows), column), -math.inf, dtype=torch.float64)
        for f, row in enumerate(rows):
            for frame, level, count in row:
                bias = torch.full_like(sizes[level], math.log(count), dtype=torch.float64)
                if self.size_bias:
                    bias += sizes[level].log()
                first = start[frame, level]
                mask[f, first : first + bias.numel()] = bias
        return mask


def _is_fake() -> bool:
    # What tells a fake mode takes 8 us, and there is none where neither of these is.
    modes = torch._C._len_torch_dispatch_stack()
    if not modes and torch._guards.TracingContext.try_get() is None:
        return False
    return torch._guards.detect_fake_mode() is not None


def pooled_counts(grid: tuple[int, int], level: int) -> Tensor:
    """Tokens averaged into each token of the level-r grid, float32 [ceil(h/r) * ceil(w/r)]."""
    h, w = grid
    rows = torch.tensor([min(level, h - y) for y in range(0, h, level)], dtype=torch.float32)
    cols = torch.tensor([min(level, w - x) for x in range(0, w, level)], dtype=torch.float32)
    return torch.outer(rows, cols).flatten()


def _merge(row: list[Segment], f: int, num_frames: int) -> list[Segment]:
    if not row:
        raise ValueError(f"query frame {f} reads no frame: name at least one")
    counts: dict[tuple[int, int], int] = {}
    for frame, level, count in row:
        if not 0 <= frame < num_frames:
            raise ValueError(
                f"query frame {f} reads frame {frame}, but there are {num_frames} frames"
            )
        if level < 0 or level == 1 or count < 1:
            raise ValueError(
                f"query frame {f} reads frame {frame} at level {level}, {count} times: "
                "levels are 0 (full) or 2 and more, counts 1 and more"
            )
        counts[frame, level] = counts.get((frame, level), 0) + count
    common = math.gcd(*counts.values())  # counts of one row matter only relative to each other
    return [Segment(frame, level, n // common) for (frame, level), n in counts.items()]


def _build_table(
    pattern: FramePattern,
    num_frames: int,
    queries: tuple[int, ...] | None,
    device: torch.device,
    for_compile: bool = False,
) -> FrameTable:
    rows = pattern.segments(num_frames, queries)
    flat = [[*s, int(pattern.size_bias and s.level > 0)] for row in rows for s in row]
    levels = sorted({s[1] for s in flat} - {0})
    if len(levels) > MAX_LEVELS:
        raise ValueError(f"a pattern may use {MAX_LEVELS} coarse levels at most, got {levels}")
    ends = [0]
    for row in rows:
        ends.append(ends[-1] + len(row))
    levels += [0] * (MAX_LEVELS - len(levels))
    with torch.inference_mode(False):  # so that the cached tensors may enter autograd later
        table = FrameTable(
            torch.tensor(ends, dtype=torch.int32, device=device),
            # A clone, for the sizes of a view's base are guarded too.
            torch.tensor(flat, dtype=torch.int32).view(-1, 4).clone().to(device),
            torch.empty(
                0, *(2 + n for n in (*levels, num_frames)), dtype=torch.int32, device=device
            ),
        )
    if for_compile:
        _mark_sizes(table)
    return table


def _mark_sizes(table: FrameTable) -> None:
    """Makes every size of the table a number of its own to torch.compile.

    Unmarked sizes that happen to be equal in the first call (segments and frames of `own`, a level
    and the batch) are guarded to stay so, and the next pattern recompiles. Called only where
    torch._dynamo is loaded already: its import takes two seconds.
    """
    for tensor, dims in zip(table, ([0], [0], [1, 2, 3]), strict=True):
        for dim in dims:
            if tensor.shape[dim] > 1:  # 0 and 1 are constants to the compiler
                torch._dynamo.maybe_mark_dynamic(tensor, dim)


_cached_table = lru_cache(maxsize=256)(_build_table)
