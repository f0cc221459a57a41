"""The kernels of the forward: pooling, and attention driven by the table of segments."""

from __future__ import annotations

import triton
import triton.language as tl

from tvkernels._triton.maths import exp2, put, tile

WGMMA = ("_attend",)
LN2 = tl.constexpr(0.6931471805599453)
# Numbers whose being 1 or a multiple of 16 helps no address: another clip compiles nothing anew.
COUNTS = [
    "scale", "batches", "frames_q", "frames", "heads", "tokens", "tokens_1", "tokens_2", "size",
    "level", "level_1", "level_2", "group", "h", "w",
]  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def _pool(
    k, v, pooled, batches, frames, heads, h, w,
    k_b, k_f, k_n, k_h, k_d, v_b, v_f, v_n, v_h, v_d,
    LEVEL: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CELLS: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """CELLS cells of one head and frame, of k and then of v, averaged LEVEL x LEVEL."""
    k_n, k_h = k_n // ALIGN * ALIGN, k_h // ALIGN * ALIGN  # known to the compiler from here
    v_n, v_h = v_n // ALIGN * ALIGN, v_h // ALIGN * ALIGN
    across = tl.cdiv(w, LEVEL)
    cells = tl.cdiv(h, LEVEL) * across
    # Heads are fastest: neighbours share the rows of all heads.
    head = (tl.program_id(0) % heads).to(tl.int64)
    block = tl.program_id(0) // heads % tl.cdiv(cells, CELLS)
    image = (tl.program_id(0) // heads // tl.cdiv(cells, CELLS)).to(tl.int64)
    frame, batch = image % frames, image // frames % batches
    of_v = image // frames >= batches
    start_k = k + batch * k_b + frame * k_f + head * k_h
    start_v = v + batch * v_b + frame * v_f + head * v_h
    start = tl.where(of_v, start_v, start_k)
    row_stride = tl.where(of_v, v_n, k_n).to(tl.int64)
    column_stride = tl.where(of_v, v_d, k_d)

    cell = block * CELLS + tl.arange(0, CELLS)
    top, left = cell // across * LEVEL, cell % across * LEVEL
    column = tl.arange(0, WIDTH)[None, :]
    total = tl.zeros([CELLS, WIDTH], tl.float32)
    for dy in range(LEVEL):
        for dx in range(LEVEL):
            y, x = top + dy, left + dx
            inside = ((cell < cells) & (y < h) & (x < w))[:, None] & (column < D)
            at = start + (y * w + x)[:, None] * row_stride + column * column_stride
            total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    count = tl.minimum(LEVEL, h - top) * tl.minimum(LEVEL, w - left)
    mean = total / tl.maximum(count, 1)[:, None].to(tl.float32)
    target = pooled + ((image * cells + block * CELLS) * heads + head) * D
    put(target, mean, cells - block * CELLS, heads * D, CELLS, 0, WIDTH, D)


@triton.jit
def counted(cell, level, h, w):
    """Tokens averaged into each cell of the level's grid, float32; 1 at level 0."""
    level = tl.maximum(level, 1)
    across = tl.cdiv(w, level)
    high = tl.minimum(level, h - cell // across * level)
    wide = tl.minimum(level, w - cell % across * level)
    return tl.maximum(high * wide, 1).to(tl.float32)


@triton.jit
def find(
    entry, k, v, k_1, v_1, k_2, v_2, batch, head, frames, heads, tokens,
    tokens_1, tokens_2, level_2, k_b, k_f, k_n, k_h, k_d, v_b, v_f, v_n, v_h, v_d,
    D: tl.constexpr, COARSE: tl.constexpr, RAGGED: tl.constexpr, K_ROW: tl.constexpr,
    V_ROW: tl.constexpr,
):  # fmt: skip
    """Where a segment's keys and values lie, their number and strides, and what weighs them.

    Returns key, value, size, strides of rows and columns (k, v, k, v), level, sized, weight.
    `weight` is added to logits in units of log 2: a frame that counts n times adds log n, and so
    does, where the segment is sized, a cell of n tokens. Cells of a RAGGED grid differ: the caller
    adds `counted` to theirs.
    """
    frame = tl.load(entry).to(tl.int64)
    level = tl.load(entry + 1)
    weight = tl.math.log2(tl.load(entry + 2).to(tl.float32))
    sized = tl.load(entry + 3) != 0
    size = tokens
    key = k + batch * k_b + frame * k_f + head * k_h
    value = v + batch * v_b + frame * v_f + head * v_h
    if COARSE:
        coarse = level != 0
        at = ((batch * frames + frame) * tokens_1 * heads + head) * D
        key, value = tl.where(coarse, k_1 + at, key), tl.where(coarse, v_1 + at, value)
        size = tl.where(coarse, tokens_1, size)
        if COARSE == 2:
            at = ((batch * frames + frame) * tokens_2 * heads + head) * D
            second = coarse & (level == level_2)
            key, value = tl.where(second, k_2 + at, key), tl.where(second, v_2 + at, value)
            size = tl.where(second, tokens_2, size)
        if not K_ROW:
            k_n = tl.where(coarse, heads * D, k_n)
        if not V_ROW:
            v_n = tl.where(coarse, heads * D, v_n)
        k_d, v_d = tl.where(coarse, 1, k_d), tl.where(coarse, 1, v_d)
        if not RAGGED:
            side = tl.maximum(level, 1).to(tl.float32)
            weight += tl.where(sized, 2.0 * tl.math.log2(side), 0.0)
    if K_ROW:
        k_n = K_ROW
    if V_ROW:
        v_n = V_ROW
    return key, value, size, k_n, v_n, k_d, v_d, level, sized, weight


@triton.jit(do_not_specialize=COUNTS)
def _attend(
    q, k, v, k_1, v_1, k_2, v_2, out, lse, row_ptr, segments, scale,
    frames_q, frames, heads, tokens, tokens_1, tokens_2, level_2, h, w,
    q_b, q_f, q_n, q_h, q_d, k_b, k_f, k_n, k_h, k_d, v_b, v_f, v_n, v_h, v_d,
    D: tl.constexpr, QK1: tl.constexpr, QK2: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, COARSE: tl.constexpr, RAGGED: tl.constexpr,
    BIASED: tl.constexpr, WHOLE: tl.constexpr, NEGATIVE: tl.constexpr, EMULATE: tl.constexpr,
    ALIGN: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, BASE2: tl.constexpr,
):  # fmt: skip
    """BM queries of one frame and head over all its segments, in one online softmax.

    Logits are in units of log 2: `scale` is |scale| / ln 2. COARSE is the number of coarse levels
    in use; their keys and values are dense, [B, F, tokens_i, H, D]. There is one inner loop, whose
    bases and strides depend on the segment: a loop for each level spills (255 registers and 96 to
    768 bytes on sm_90).
    """
    q_n, q_h = q_n // ALIGN * ALIGN, q_h // ALIGN * ALIGN  # known to the compiler from here
    k_n, k_h = k_n // ALIGN * ALIGN, k_h // ALIGN * ALIGN
    v_n, v_h = v_n // ALIGN * ALIGN, v_h // ALIGN * ALIGN
    # Tiles of one head and frame are neighbours: they read the same keys, from L2.
    blocks = tl.cdiv(tokens, BM)
    block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    image = (tl.program_id(0) // blocks // heads).to(tl.int64)
    batch, frame = image // frames_q, image % frames_q
    first = block * BM
    start = q + batch * q_b + frame * q_f + head * q_h
    start += first.to(tl.int64) * q_n
    q1 = tile(start, tokens - first, q_n, q_d, BM, 0, QK1, D, False)
    if NEGATIVE:
        q1 = -q1
    if QK2:
        q2 = tile(start, tokens - first, q_n, q_d, BM, QK1, QK2, D, False)
        if NEGATIVE:
            q2 = -q2

    peak = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    sum1 = tl.zeros([BM, D1], tl.float32)
    if D2:
        sum2 = tl.zeros([BM, D2], tl.float32)
    columns = tl.arange(0, BN)
    step = tl.full([], BN, tl.int64)

    for segment in range(tl.load(row_ptr + frame), tl.load(row_ptr + frame + 1)):
        key, value, size, k_row, v_row, k_column, v_column, level, sized, weight = find(
            segments + 4 * segment, k, v, k_1, v_1, k_2, v_2, batch, head, frames, heads, tokens,
            tokens_1, tokens_2, level_2, k_b, k_f, k_n, k_h, k_d, v_b, v_f, v_n, v_h, v_d,
            D, COARSE, RAGGED, K_ROW, V_ROW,
        )  # fmt: skip
        for done in range(0, size, BN):
            left = size - done
            k1 = tile(key, left, k_row, k_column, BN, 0, QK1, D, WHOLE)
            scores = tl.dot(q1, tl.trans(k1), input_precision="ieee")
            if QK2:
                k2 = tile(key, left, k_row, k_column, BN, QK1, QK2, D, WHOLE)
                scores = tl.dot(q2, tl.trans(k2), scores, input_precision="ieee")
            before = peak
            if BIASED:
                bias = tl.where(columns < left, weight, float("-inf"))
                if RAGGED:
                    bias += tl.where(
                        sized, tl.math.log2(counted(done + columns, level, h, w)), 0.0
                    )
                scores = scores * scale + bias[None, :]
                peak = tl.maximum(before, tl.max(scores, 1))
                weights = exp2(scores - peak[:, None], EMULATE)
            else:
                peak = tl.maximum(before, tl.max(scores, 1) * scale + weight)
                weights = exp2(scores * scale - (peak - weight)[:, None], EMULATE)
            rescale = tl.math.exp2(before - peak)
            total = total * rescale + tl.sum(weights, 1)
            weights = weights.to(v.dtype.element_ty)
            v1 = tile(value, left, v_row, v_column, BN, 0, D1, D, WHOLE)
            sum1 = tl.dot(weights, v1, sum1 * rescale[:, None], input_precision="ieee")
            if D2:
                v2 = tile(value, left, v_row, v_column, BN, D1, D2, D, WHOLE)
                sum2 = tl.dot(weights, v2, sum2 * rescale[:, None], input_precision="ieee")
            key += step * k_row
            value += step * v_row

    inverse = (1.0 / total)[:, None]  # one division a row, not one an element
    target = out + ((image * tokens + first) * heads + head) * D
    put(target, sum1 * inverse, tokens - first, heads * D, BM, 0, D1, D)
    if D2:
        put(target, sum2 * inverse, tokens - first, heads * D, BM, D1, D2, D)
    if lse is not None:
        row = first + tl.arange(0, BM)
        at = lse + (image * tokens + row) * heads + head
        sums = peak + tl.math.log2(total)
        if not BASE2:
            sums *= LN2
        tl.store(at, sums, mask=row < tokens)
