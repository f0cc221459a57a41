"""Contract of frame_attention: schema, fake, checks, public function. Imports torch only."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from tvkernels._dispatch import Op, exporting
from tvkernels.patterns import FramePattern, FrameTable


def _fake(q, k, v, row_ptr, segments, levels, h, w, scale, return_lse):
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty(q.shape[:-1] if return_lse else (0,), dtype=wide)
    return q.new_empty(q.shape), lse


OP = Op(
    "frame_attention",
    "Tensor q, Tensor k, Tensor v, Tensor row_ptr, Tensor segments, SymInt[] levels, "
    "SymInt h, SymInt w, float? scale, bool return_lse",
    "(Tensor, Tensor)",
    _fake,
    backends=("triton", "native", "cpu", "reference"),
    differentiable=(0, 1, 2),
)


def frame_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: FramePattern | FrameTable,
    *,
    grid: tuple[int, int] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each frame over the frames and levels its pattern names (EI2, eq. 10).

    Args:
        q: [B, Fq, N, H, D], any strides.
        k, v: [B, F, N, H, D] of q's dtype; F may exceed Fq (cached frames), the pattern's numbers
            are theirs.
        pattern: a `FramePattern`, or its `table` (tensors: a new one never recompiles), which is
            also the way to query some frames of F: ``pattern.table(F, queries=(3, 4))``.
        grid: (h, w) with h * w = N; needed only where the pattern pools.
        scale: factor of the scores, D**-0.5 if None.
        return_lse: also return the log-sum-exp of the biased, scaled scores, with which results
            over disjoint key sets merge exactly.
        backend: "auto" or a name; a named backend never falls back.
    Returns:
        [B, Fq, N, H, D], and with `return_lse` a [B, Fq, N, H] in float32 at least.
    Raises:
        ValueError: shapes, dtypes, grid or pattern do not fit; the text says how.
        BackendError: no backend, or not the named one, can run this call.
    """
    _check(q, k, v)
    if isinstance(pattern, FramePattern):
        if pattern.lists is None and q.shape[1] != k.shape[1]:
            raise ValueError(
                f"q has {q.shape[1]} frames and k {k.shape[1]}: say which of k's frames are "
                "queried, with pattern.table(F, queries=...)"
            )
        if exporting():
            lean = importlib.import_module("tvkernels.ops.frame_attention.cpu")
            out, lse = lean.attend(
                q, k, v, *lean.plan(pattern, k.shape[1]), grid, scale, return_lse
            )
            return (out, lse) if return_lse else out
        table = pattern.table(k.shape[1], device=q.device)
    else:
        table = pattern
    if table.row_ptr.shape[0] != q.shape[1] + 1:
        raise ValueError(
            f"the pattern has rows for {table.row_ptr.shape[0] - 1} frames, q has {q.shape[1]}"
        )
    # A compiler would take a size that is compared for fixed, and build anew for another pattern.
    free = isinstance(pattern, FramePattern) or not torch.compiler.is_compiling()
    if free and table.num_frames != k.shape[1]:
        raise ValueError(
            f"the pattern's table is of {table.num_frames} frames, k has {k.shape[1]}"
        )
    if free and grid is None and any(table.coarse_levels):
        raise ValueError(
            "this pattern pools tokens: pass grid=(h, w), which merged tokens do not have"
        )
    if grid is not None and grid[0] * grid[1] != q.shape[2]:
        raise ValueError(f"grid {tuple(grid)} does not hold the {q.shape[2]} tokens of a frame")
    h, w = grid or (0, 0)
    out, lse = OP(
        q, k, v, table.row_ptr, table.segments, table.coarse_levels, h, w, scale, return_lse,
        backend=backend,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 5 or k.dim() != 5:
        raise ValueError(f"q, k, v are [B, F, N, H, D], got {tuple(q.shape)}, {tuple(k.shape)}")
    same = q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:]
    if not same or k.shape != v.shape:
        raise ValueError(
            "q, k, v must agree in all but q's frames: "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k, v need one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
