"""The kernels of the backward: one over tiles of queries, one over tiles of keys; no atomics."""

from __future__ import annotations

import triton
import triton.language as tl

from tvkernels.ops.frame_attention.kernels import (
    COUNTS,
    against,
    biased,
    counted,
    find,
    halves,
    onto,
    store,
    weigh,
)  # fmt: skip

WGMMA = ("_differentiate_queries", "_differentiate_keys")


@triton.jit(do_not_specialize=COUNTS)
def _differentiate_queries(
    q, k, v, k_1, v_1, k_2, v_2, out, grad, norm, share, grad_lse, delta, dq, row_ptr, segments,
    scale, factor, frames_q, frames, heads, tokens, tokens_1, tokens_2, level_2, h, w,
    q_b, q_f, q_n, q_h, q_d, k_b, k_f, k_n, k_h, k_d, v_b, v_f, v_n, v_h, v_d,
    g_b, g_f, g_n, g_h, g_d,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    COARSE: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr,
):  # fmt: skip
    """dq of BM queries of one frame and head, and their `delta` for the keys.

    Programs and logits as in `_attend`, but that `scale` keeps its sign. The probability of a key
    is exp2(logit - norm): `norm` is the log-sum-exp, and delta = sum(grad * out) - grad_lse. In
    float32 that rounds too much. There is a `share` then, and no `out`: a first walk over the keys
    finds norm, now the largest logit, the share 1 / sum(exp2(logit - norm)) that a probability
    also takes, and delta as a mean of the very slopes it is taken from.
    """
    q_n, q_h = q_n // ALIGN * ALIGN, q_h // ALIGN * ALIGN  # known to the compiler from here
    k_n, k_h = k_n // ALIGN * ALIGN, k_h // ALIGN * ALIGN
    v_n, v_h = v_n // ALIGN * ALIGN, v_h // ALIGN * ALIGN
    g_n, g_h = g_n // ALIGN * ALIGN, g_h // ALIGN * ALIGN
    blocks = tl.cdiv(tokens, BM)
    first = tl.program_id(0) % blocks * BM
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    image = (tl.program_id(0) // blocks // heads).to(tl.int64)
    batch, frame = image // frames_q, image % frames_q
    rest = tokens - first

    start = q + batch * q_b + frame * q_f + head * q_h + first.to(tl.int64) * q_n
    outer = grad + batch * g_b + frame * g_f + head * g_h + first.to(tl.int64) * g_n
    place = (image * tokens + first) * heads + head
    q1, q2 = halves(start, rest, q_n, q_d, BM, D1, D2, D, False)
    g1, g2 = halves(outer, rest, g_n, g_d, BM, D1, D2, D, False)
    dq1 = tl.zeros([BM, D1], tl.float32)
    dq2 = tl.zeros([BM, D2 if D2 else D1], tl.float32)
    row = tl.arange(0, BM)
    per_row = place + row * heads
    step = tl.full([], BN, tl.int64)
    if grad_lse is None:
        through = tl.zeros([BM], tl.float32)
    else:
        through = tl.load(grad_lse + per_row, mask=row < rest, other=0.0)
    if share is None:
        o1, o2 = halves(out + place * D, rest, heads * D, 1, BM, D1, D2, D, False)
        sums = tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1) - through
        if D2:
            sums += tl.sum(g2.to(tl.float32) * o2.to(tl.float32), 1)
        tl.store(delta + per_row, sums, mask=row < rest)
        peak = tl.load(norm + per_row, mask=row < rest, other=0.0)
    else:
        sums = tl.zeros([BM], tl.float32)
        peak = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)

    TURNS: tl.constexpr = 1 if share is None else 2
    for turn in tl.static_range(TURNS):
        for segment in range(tl.load(row_ptr + frame), tl.load(row_ptr + frame + 1)):
            key, value, size, k_row, v_row, k_column, v_column, weight, level, uneven = find(
                segments + 4 * segment, k, v, k_1, v_1, k_2, v_2, batch, head, frames, heads,
                tokens, tokens_1, tokens_2, level_2, h, w, k_b, k_f, k_n, k_h, k_d,
                v_b, v_f, v_n, v_h, v_d, D, COARSE, K_ROW, V_ROW,
            )  # fmt: skip
            for done in range(0, size, BN):
                k1, k2 = halves(key, size - done, k_row, k_column, BN, D1, D2, D, EVEN)
                v1, v2 = halves(value, size - done, v_row, v_column, BN, D1, D2, D, EVEN)
                scores = against(q1, q2, k1, k2, D2)
                slope = against(g1, g2, v1, v2, D2)
                if not EVEN:
                    scores = biased(scores * scale, done, size, weight, level, uneven, h, w, BN)
                if turn + 1 < TURNS:
                    if EVEN:
                        scores = scores * scale + weight
                    before = peak
                    peak = tl.maximum(before, tl.max(scores, 1))
                    weights = tl.math.exp2(scores - peak[:, None])
                    rescale = tl.math.exp2(before - peak)
                    total = total * rescale + tl.sum(weights, 1)
                    sums = sums * rescale + tl.sum(weights * slope, 1)
                else:
                    if EVEN:
                        weights = tl.math.exp2(scores * scale - (peak - weight)[:, None])
                    else:
                        weights = tl.math.exp2(scores - peak[:, None])
                    slope = (weights * (slope - sums[:, None])).to(k.dtype.element_ty)
                    dq1, dq2 = onto(dq1, dq2, slope, k1, k2, D2)
                key += step * k_row
                value += step * v_row
        if turn + 1 < TURNS:
            sums = sums / total - through
            tl.store(delta + per_row, sums, mask=row < rest)
            tl.store(norm + per_row, peak, mask=row < rest)
            tl.store(share + per_row, 1.0 / total, mask=row < rest)

    dq1, dq2 = dq1 * factor, dq2 * factor
    if share is not None:
        dq1, dq2 = dq1 / total[:, None], dq2 / total[:, None]
    store(dq + place * D, dq1, dq2, rest, heads * D, BM, D1, D2, D)


@triton.jit(do_not_specialize=COUNTS)
def _differentiate_keys(
    q, k, v, grad, norm, share, delta, dk, dv, dk_1, dv_1, dk_2, dv_2,
    starts, order, queries, segments, scale, factor, group,
    frames_q, frames, heads, tokens, size, level, level_1, level_2, h, w,
    q_b, q_f, q_n, q_h, q_d, k_b, k_f, k_n, k_h, k_d, v_b, v_f, v_n, v_h, v_d,
    g_b, g_f, g_n, g_h, g_d,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    EVEN: tl.constexpr, ALIGN: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    Q_ROW: tl.constexpr, G_ROW: tl.constexpr,
):  # fmt: skip
    """dk (KEYS) and dv (VALUES) of BN keys of one frame, head and level over all their readers.

    The inverse of the table names these: segments order[starts[group + frame]:...] of the query
    frames queries[...]. Level 0 comes last and starts from its cells' share of the gradients of
    the levels level_1 and level_2, 0 where there is none; of dk these lack the `factor`.
    Scores are transposed, [keys, queries], so that they are the left operand of dk and dv.
    """
    q_n, q_h = q_n // ALIGN * ALIGN, q_h // ALIGN * ALIGN  # known to the compiler from here
    k_n, k_h = k_n // ALIGN * ALIGN, k_h // ALIGN * ALIGN
    v_n, v_h = v_n // ALIGN * ALIGN, v_h // ALIGN * ALIGN
    g_n, g_h = g_n // ALIGN * ALIGN, g_h // ALIGN * ALIGN
    if Q_ROW:
        q_n = Q_ROW
    if G_ROW:
        g_n = G_ROW
    blocks = tl.cdiv(size, BN)
    first = tl.program_id(0) % blocks * BN
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    image = (tl.program_id(0) // blocks // heads).to(tl.int64)
    batch, frame = image // frames, image % frames
    rest = size - first
    row, column = tl.arange(0, BN), tl.arange(0, BM)

    # Before the tiles: after them these sums spill registers at head dim 160 on sm_90.
    if KEYS:
        dk1, dk2 = shares(
            dk_1, dk_2, image, head, heads, first, size, level_1, level_2, h, w, BN, D1, D2, D
        )
    if VALUES:
        dv1, dv2 = shares(
            dv_1, dv_2, image, head, heads, first, size, level_1, level_2, h, w, BN, D1, D2, D
        )
    key = k + batch * k_b + frame * k_f + head * k_h + first.to(tl.int64) * k_n
    k1, k2 = halves(key, rest, k_n, k_d, BN, D1, D2, D, False)
    if KEYS:
        value = v + batch * v_b + frame * v_f + head * v_h + first.to(tl.int64) * v_n
        v1, v2 = halves(value, rest, v_n, v_d, BN, D1, D2, D, False)
    tall = tl.full([], BM, tl.int64)

    for reader in range(tl.load(starts + group + frame), tl.load(starts + group + frame + 1)):
        segment = tl.load(order + reader)
        query = tl.load(queries + segment).to(tl.int64)
        weight, uneven = weigh(segments + 4 * segment, level, h, w)
        start = q + batch * q_b + query * q_f + head * q_h
        outer = grad + batch * g_b + query * g_f + head * g_h
        place = (batch * frames_q + query) * tokens * heads + head + column * heads
        if not EVEN:
            bias = tl.zeros([BN], tl.float32) + weight
            if uneven:
                bias += tl.math.log2(counted(first + row, level, h, w))
        for done in range(0, tokens, BM):
            left = tokens - done
            q1, q2 = halves(start, left, q_n, q_d, BM, D1, D2, D, EVEN)
            g1, g2 = halves(outer, left, g_n, g_d, BM, D1, D2, D, EVEN)
            # Infinity leaves queries beyond the last no weight.
            peak = tl.load(norm + place, mask=column < left, other=float("inf"))
            scores = against(k1, k2, q1, q2, D2)
            if EVEN:
                weights = tl.math.exp2(scores * scale - (peak - weight)[None, :])
            else:
                weights = tl.math.exp2(scores * scale + bias[:, None] - peak[None, :])
            if share is not None:
                weights *= tl.load(share + place, mask=column < left, other=0.0)[None, :]
            if VALUES:
                dv1, dv2 = onto(dv1, dv2, weights.to(q.dtype.element_ty), g1, g2, D2)
            if KEYS:
                sums = tl.load(delta + place, mask=column < left, other=0.0)
                slope = against(v1, v2, g1, g2, D2)
                slope = (weights * (slope - sums[None, :])).to(q.dtype.element_ty)
                dk1, dk2 = onto(dk1, dk2, slope, q1, q2, D2)
            start += tall * q_n
            outer += tall * g_n
            place += BM * heads

    target = ((image * size + first) * heads + head) * D
    if KEYS:
        store(dk + target, dk1 * factor, dk2 * factor, rest, heads * D, BN, D1, D2, D)
    if VALUES:
        store(dv + target, dv1, dv2, rest, heads * D, BN, D1, D2, D)


@triton.jit
def shares(
    grad_1, grad_2, image, head, heads, first, tokens, level_1, level_2, h, w,
    ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """What ROWS tokens take of the gradients of their cells at all coarse levels, two widths."""
    x1 = tl.zeros([ROWS, D1], tl.float32)
    x2 = tl.zeros([ROWS, D2 if D2 else D1], tl.float32)
    token = first + tl.arange(0, ROWS)
    if level_1 > 0:
        x1 += share_of(grad_1, image, head, heads, token, tokens, level_1, h, w, 0, D1, D)
        if D2:
            x2 += share_of(grad_1, image, head, heads, token, tokens, level_1, h, w, D1, D2, D)
    if level_2 > 0:
        x1 += share_of(grad_2, image, head, heads, token, tokens, level_2, h, w, 0, D1, D)
        if D2:
            x2 += share_of(grad_2, image, head, heads, token, tokens, level_2, h, w, D1, D2, D)
    return x1, x2


@triton.jit
def share_of(
    grad, image, head, heads, token, tokens, level, h, w,
    START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """What each token takes of the gradient of its cell: the adjoint of the average."""
    wide = tl.cdiv(w, level)
    cell = token // w // level * wide + token % w // level
    count = counted(cell, level, h, w)
    column = START + tl.arange(0, WIDTH)[None, :]
    at = (image * (tl.cdiv(h, level) * wide) + cell)[:, None] * heads + head
    inside = (token < tokens)[:, None] & (column < D)
    return tl.load(grad + at * D + column, mask=inside, other=0.0) / count[:, None]
