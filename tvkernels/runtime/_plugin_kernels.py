"""Our attention kernels with the arguments that TensorRT gives an ahead-of-time plugin.

Those are inputs, then scalars, then outputs, all dense: strides follow from the sizes.
"""

import triton
import triton.language as tl

from tvkernels._dispatch import OPS

_attend_frames = OPS["frame_attention"].backend("triton")._attend
_attend_time = OPS["temporal_attention"].backend("triton")._attend


@triton.jit
def temporal_attention(
    q, k, v, cells, out,
    NUM: tl.constexpr, HEADS: tl.constexpr, SCALE: tl.constexpr, CELLS: tl.constexpr,
    FRAMES: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """[B, F, N, H, D]; cells = N * H."""
    f = cells.to(tl.int64) * HEAD_DIM
    n = HEADS * HEAD_DIM
    _attend_time(
        q, k, v, out, NUM, cells, HEADS, SCALE,
        NUM * f, f, n, HEAD_DIM, 1, NUM * f, f, n, HEAD_DIM, 1,
        NUM * f, f, n, HEAD_DIM, 1, NUM * f, f, n, HEAD_DIM, 1,
        CELLS, FRAMES, HEAD_DIM, CHUNK, TAIL, ALIGN,
    )  # fmt: skip


@triton.jit
def frame_attention(
    q, k, v, row_ptr, segments, tokens, out,
    NUM: tl.constexpr, HEADS: tl.constexpr, SCALE: tl.constexpr, D: tl.constexpr,
    QK1: tl.constexpr, QK2: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EMULATE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """[B, F, N, H, D] by a pattern at full resolution."""
    n = HEADS * D
    f = tokens.to(tl.int64) * n
    _attend_frames(
        q, k, v, None, None, None, None, out, None, row_ptr, segments, SCALE, 0,
        NUM, NUM, HEADS, tokens, 0, 0, 0, 0, 0,
        NUM * f, f, n, D, 1, NUM * f, f, n, D, 1, NUM * f, f, n, D, 1,
        D, QK1, QK2, D1, D2, BM, BN, 0, False, False, EMULATE, ALIGN, HEADS * D, HEADS * D,
    )  # fmt: skip


@triton.jit
def frame_attention_coarse(
    q, k, v, row_ptr, segments, k_1, v_1, grid, tokens, tokens_1, h, w, out,
    NUM: tl.constexpr, HEADS: tl.constexpr, SCALE: tl.constexpr, D: tl.constexpr,
    QK1: tl.constexpr, QK2: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EMULATE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The same with one coarse level, whose keys and values k_1, v_1 are pooled already.

    grid is [h, w] and read by nobody: a plugin learns sizes from shapes.
    """
    n = HEADS * D
    f = tokens.to(tl.int64) * n
    _attend_frames(
        q, k, v, k_1, v_1, None, None, out, None, row_ptr, segments, SCALE, 0,
        NUM, NUM, HEADS, tokens, tokens_1, 0, 0, h, w,
        NUM * f, f, n, D, 1, NUM * f, f, n, D, 1, NUM * f, f, n, D, 1,
        D, QK1, QK2, D1, D2, BM, BN, 1, False, False, EMULATE, ALIGN, HEADS * D, HEADS * D,
    )  # fmt: skip
