"""The kernels of the forward: pooling, and attention driven by the table of segments."""

from __future__ import annotations

import triton
import triton.language as tl

from tvkernels._triton.maths import exp2, put, tile

WGMMA = ("_attend",)
# Numbers whose being 1 or a multiple of 16 helps no address: another clip compiles nothing anew.
COUNTS = [
    "scale", "unit", "factor", "batches", "frames_q", "frames", "heads", "tokens", "tokens_1",
    "tokens_2", "size", "level", "level_1", "level_2", "group", "h", "w",
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
    tokens_1, tokens_2, level_2, h, w, k_b, k_f, k_n, k_h, k_d, v_b, v_f, v_n, v_h, v_d,
    D: tl.constexpr, COARSE: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
):  # fmt: skip
    """Where a segment's keys and values lie, their number and strides, and what weighs them.

    Returns key, value, size, strides of rows and columns (k, v, k, v), weight, level, uneven.
    """
    frame = tl.load(entry).to(tl.int64)
    level = tl.load(entry + 1)
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
    if K_ROW:
        k_n = K_ROW
    if V_ROW:
        v_n = V_ROW
    weight, uneven = weigh(entry, level, h, w)
    return key, value, size, k_n, v_n, k_d, v_d, weight, level, uneven


@triton.jit
def weigh(entry, level, h, w):
    """What a segment adds to its logits, in units of log 2, and whether its cells differ.

    A frame that counts n times adds log n, and so does, where the segment is sized, a cell of n
    tokens. Where these cells are uneven, `counted` is the caller's to add.
    """
    weight = tl.math.log2(tl.load(entry + 2).to(tl.float32))
    sized = tl.load(entry + 3) != 0
    side = tl.maximum(level, 1)
    uneven = sized & (h % side + w % side != 0)
    even = tl.where(sized & (uneven == 0), side, 1)
    return weight + 2.0 * tl.math.log2(even.to(tl.float32)), uneven


@triton.jit
def halves(
    base, size, row_stride, column_stride,
    ROWS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, D: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """A tile in two widths; where SECOND is 0, the first again, which nothing reads."""
    x1 = tile(base, size, row_stride, column_stride, ROWS, 0, FIRST, D, WHOLE)
    x2 = x1
    if SECOND:
        x2 = tile(base, size, row_stride, column_stride, ROWS, FIRST, SECOND, D, WHOLE)
    return x1, x2


@triton.jit
def against(x1, x2, y1, y2, SECOND: tl.constexpr):
    """x y^T of tiles in two widths."""
    product = tl.dot(x1, tl.trans(y1), input_precision="ieee")
    if SECOND:
        product = tl.dot(x2, tl.trans(y2), product, input_precision="ieee")
    return product


@triton.jit
def onto(sum1, sum2, weights, x1, x2, SECOND: tl.constexpr):
    """sum + weights x of tiles in two widths."""
    sum1 = tl.dot(weights, x1, sum1, input_precision="ieee")
    if SECOND:
        sum2 = tl.dot(weights, x2, sum2, input_precision="ieee")
    return sum1, sum2


@triton.jit
def store(
    base, x1, x2, size, row_stride,
    ROWS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Writes a tile in two widths."""
    put(base, x1, size, row_stride, ROWS, 0, FIRST, D)
    if SECOND:
        put(base, x2, size, row_stride, ROWS, FIRST, SECOND, D)


@triton.jit
def biased(scores, done, size, weight, level, uneven, h, w, BN: tl.constexpr):
    """Scores plus what weighs keys `done`... of a segment; none for keys beyond its last."""
    key = done + tl.arange(0, BN)
    bias = tl.where(key < size, weight, float("-inf"))
    if uneven:
        bias += tl.math.log2(counted(key, level, h, w))
    return scores + bias[None, :]


@triton.jit(do_not_specialize=COUNTS)
def _attend(
    q, k, v, k_1, v_1, k_2, v_2, out, lse, row_ptr, segments, scale, unit,
    frames_q, frames, heads, tokens, tokens_1, tokens_2, level_2, h, w,
    q_b, q_f, q_n, q_h, q_d, k_b, k_f, k_n, k_h, k_d, v_b, v_f, v_n, v_h, v_d,
    D: tl.constexpr, QK1: tl.constexpr, QK2: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, COARSE: tl.constexpr, EVEN: tl.constexpr,
    NEGATIVE: tl.constexpr, EMULATE: tl.constexpr, ALIGN: tl.constexpr,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr,
):  # fmt: skip
    """BM queries of one frame and head over all its segments, in one online softmax.

    Logits are in units of log 2: `scale` is |scale| / ln 2. The log-sum-exp, which `unit` takes
    from there to the caller's, is not written where that is 0. EVEN says that tiles are full and
    the cells of a level alike. COARSE is the number of coarse levels in use; their keys and values
    are dense, [B, F, tokens_i, H, D]. There is one inner loop, whose bases and strides depend on
    the segment: a loop for each level spills (255 registers and 96 to 768 bytes on sm_90).
    """
    q_n, q_h = q_n // ALIGN * ALIGN, q_h // ALIGN * ALIGN  # known to the compiler from here
    k_n, k_h = k_n // ALIGN * ALIGN, k_h // ALIGN * ALIGN
    v_n, v_h = v_n // ALIGN * ALIGN, v_h // ALIGN * ALIGN
    # Tiles of one head and frame are neighbours: they read the same keys, from L2.
    blocks = tl.cdiv(tokens, BM)
    first = tl.program_id(0) % blocks * BM
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    image = (tl.program_id(0) // blocks // heads).to(tl.int64)
    batch, frame = image // frames_q, image % frames_q
    rest = tokens - first
    start = q + batch * q_b + frame * q_f + head * q_h + first.to(tl.int64) * q_n
    q1, q2 = halves(start, rest, q_n, q_d, BM, QK1, QK2, D, False)
    if NEGATIVE:
        q1, q2 = -q1, -q2

    peak = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    sum1 = tl.zeros([BM, D1], tl.float32)
    sum2 = tl.zeros([BM, D2 if D2 else D1], tl.float32)
    step = tl.full([], BN, tl.int64)

    for segment in range(tl.load(row_ptr + frame), tl.load(row_ptr + frame + 1)):
        key, value, size, k_row, v_row, k_column, v_column, weight, level, uneven = find(
            segments + 4 * segment, k, v, k_1, v_1, k_2, v_2, batch, head, frames, heads, tokens,
            tokens_1, tokens_2, level_2, h, w, k_b, k_f, k_n, k_h, k_d, v_b, v_f, v_n, v_h, v_d,
            D, COARSE, K_ROW, V_ROW,
        )  # fmt: skip
        for done in range(0, size, BN):
            k1, k2 = halves(key, size - done, k_row, k_column, BN, QK1, QK2, D, EVEN)
            scores = against(q1, q2, k1, k2, QK2)
            before = peak
            if EVEN:
                peak = tl.maximum(before, tl.max(scores, 1) * scale + weight)
                weights = exp2(scores * scale - (peak - weight)[:, None], EMULATE)
            else:
                scores = biased(scores * scale, done, size, weight, level, uneven, h, w, BN)
                peak = tl.maximum(before, tl.max(scores, 1))
                weights = exp2(scores - peak[:, None], EMULATE)
            rescale = tl.math.exp2(before - peak)
            total = total * rescale + tl.sum(weights, 1)
            v1, v2 = halves(value, size - done, v_row, v_column, BN, D1, D2, D, EVEN)
            sum1, sum2 = onto(
                sum1 * rescale[:, None], sum2 * rescale[:, None],
                weights.to(v.dtype.element_ty), v1, v2, D2,
            )  # fmt: skip
            key += step * k_row
            value += step * v_row

    inverse = (1.0 / total)[:, None]  # one division a row, not one an element
    place = (image * tokens + first) * heads + head
    store(out + place * D, sum1 * inverse, sum2 * inverse, rest, heads * D, BM, D1, D2, D)
    if unit != 0:
        row = tl.arange(0, BM)
        tl.store(lse + place + row * heads, (peak + tl.math.log2(total)) * unit, mask=row < rest)
