"""The kernels of the backward: one over tiles of queries, one over tiles of keys; no atomics."""

from __future__ import annotations

import triton
import triton.language as tl

from tvkernels._triton.maths import put, tile
from tvkernels.ops.frame_attention.kernels import COUNTS, LN2, counted, find

WGMMA = ("_differentiate_queries", "_differentiate_keys")


@triton.jit(do_not_specialize=COUNTS)
def _differentiate_queries(
    q, k, v, k_1, v_1, k_2, v_2, out, grad, lse, grad_lse, delta, dq, row_ptr, segments, scale,
    frames_q, frames, heads, tokens, tokens_1, tokens_2, level_2, h, w,
    q_b, q_f, q_n, q_h, q_d, k_b, k_f, k_n, k_h, k_d, v_b, v_f, v_n, v_h, v_d,
    g_b, g_f, g_n, g_h, g_d,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    COARSE: tl.constexpr, RAGGED: tl.constexpr, BIASED: tl.constexpr, WHOLE: tl.constexpr,
    ALIGN: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
):  # fmt: skip
    """dq of BM queries of one frame and head, and their delta = sum(grad * out) - grad_lse.

    Programs and logits as in `_attend`, but that `scale` keeps its sign.
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
    q1 = tile(start, rest, q_n, q_d, BM, 0, D1, D, False)
    g1 = tile(outer, rest, g_n, g_d, BM, 0, D1, D, False)
    o1 = tile(out + place * D, rest, heads * D, 1, BM, 0, D1, D, False)
    sums = tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
    dq1 = tl.zeros([BM, D1], tl.float32)
    if D2:
        q2 = tile(start, rest, q_n, q_d, BM, D1, D2, D, False)
        g2 = tile(outer, rest, g_n, g_d, BM, D1, D2, D, False)
        o2 = tile(out + place * D, rest, heads * D, 1, BM, D1, D2, D, False)
        sums += tl.sum(g2.to(tl.float32) * o2.to(tl.float32), 1)
        dq2 = tl.zeros([BM, D2], tl.float32)
    row = tl.arange(0, BM)
    if grad_lse is not None:
        sums -= tl.load(grad_lse + place + row * heads, mask=row < rest, other=0.0)
    tl.store(delta + place + row * heads, sums, mask=row < rest)
    norm = tl.load(lse + place + row * heads, mask=row < rest, other=0.0)
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
            k1 = tile(key, left, k_row, k_column, BN, 0, D1, D, WHOLE)
            v1 = tile(value, left, v_row, v_column, BN, 0, D1, D, WHOLE)
            scores = tl.dot(q1, tl.trans(k1), input_precision="ieee")
            slope = tl.dot(g1, tl.trans(v1), input_precision="ieee")
            if D2:
                k2 = tile(key, left, k_row, k_column, BN, D1, D2, D, WHOLE)
                v2 = tile(value, left, v_row, v_column, BN, D1, D2, D, WHOLE)
                scores = tl.dot(q2, tl.trans(k2), scores, input_precision="ieee")
                slope = tl.dot(g2, tl.trans(v2), slope, input_precision="ieee")
            if BIASED:
                bias = tl.where(columns < left, weight, float("-inf"))
                if RAGGED:
                    bias += tl.where(
                        sized, tl.math.log2(counted(done + columns, level, h, w)), 0.0
                    )
                weights = tl.math.exp2(scores * scale + bias[None, :] - norm[:, None])
            else:
                weights = tl.math.exp2(scores * scale - (norm - weight)[:, None])
            slope = (weights * (slope - sums[:, None])).to(k.dtype.element_ty)
            dq1 = tl.dot(slope, k1, dq1, input_precision="ieee")
            if D2:
                dq2 = tl.dot(slope, k2, dq2, input_precision="ieee")
            key += step * k_row
            value += step * v_row

    put(dq + place * D, dq1 * (scale * LN2), rest, heads * D, BM, 0, D1, D)
    if D2:
        put(dq + place * D, dq2 * (scale * LN2), rest, heads * D, BM, D1, D2, D)


@triton.jit(do_not_specialize=COUNTS)
def _differentiate_keys(
    q, k, v, grad, lse, delta, dk, dv, dk_1, dv_1, dk_2, dv_2,
    starts, order, queries, segments, scale, group,
    frames_q, frames, heads, tokens, size, level, level_1, level_2, h, w,
    q_b, q_f, q_n, q_h, q_d, k_b, k_f, k_n, k_h, k_d, v_b, v_f, v_n, v_h, v_d,
    g_b, g_f, g_n, g_h, g_d,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    COARSE: tl.constexpr, RAGGED: tl.constexpr, WHOLE: tl.constexpr, ALIGN: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, Q_ROW: tl.constexpr, G_ROW: tl.constexpr,
):  # fmt: skip
    """dk (KEYS) and dv (VALUES) of BN keys of one frame, head and level over all their readers.

    The inverse of the table names these: segments order[starts[group + frame]:...] of the query
    frames queries[...]. Level 0 comes last and adds its cells' share of the COARSE gradients.
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

    key = k + batch * k_b + frame * k_f + head * k_h + first.to(tl.int64) * k_n
    value = v + batch * v_b + frame * v_f + head * v_h + first.to(tl.int64) * v_n
    k1 = tile(key, rest, k_n, k_d, BN, 0, D1, D, False)
    if D2:
        k2 = tile(key, rest, k_n, k_d, BN, D1, D2, D, False)
    if KEYS:
        v1 = tile(value, rest, v_n, v_d, BN, 0, D1, D, False)
        dk1 = tl.zeros([BN, D1], tl.float32)
        if D2:
            v2 = tile(value, rest, v_n, v_d, BN, D1, D2, D, False)
            dk2 = tl.zeros([BN, D2], tl.float32)
    if VALUES:
        dv1 = tl.zeros([BN, D1], tl.float32)
        if D2:
            dv2 = tl.zeros([BN, D2], tl.float32)
    tall = tl.full([], BM, tl.int64)

    for reader in range(tl.load(starts + group + frame), tl.load(starts + group + frame + 1)):
        segment = tl.load(order + reader)
        query = tl.load(queries + segment).to(tl.int64)
        weight = tl.math.log2(tl.load(segments + 4 * segment + 2).to(tl.float32))
        sized = tl.load(segments + 4 * segment + 3) != 0
        if RAGGED:
            bias = tl.where(sized, tl.math.log2(counted(first + row, level, h, w)), 0.0) + weight
        else:
            side = tl.maximum(level, 1).to(tl.float32)
            weight += tl.where(sized, 2.0 * tl.math.log2(side), 0.0)
        start = q + batch * q_b + query * q_f + head * q_h
        outer = grad + batch * g_b + query * g_f + head * g_h
        place = (batch * frames_q + query) * tokens * heads + head + column * heads
        for done in range(0, tokens, BM):
            left = tokens - done
            q1 = tile(start, left, q_n, q_d, BM, 0, D1, D, WHOLE)
            g1 = tile(outer, left, g_n, g_d, BM, 0, D1, D, WHOLE)
            # Infinity leaves queries beyond the last no weight.
            norm = tl.load(lse + place, mask=column < left, other=float("inf"))
            scores = tl.dot(k1, tl.trans(q1), input_precision="ieee")
            if D2:
                q2 = tile(start, left, q_n, q_d, BM, D1, D2, D, WHOLE)
                g2 = tile(outer, left, g_n, g_d, BM, D1, D2, D, WHOLE)
                scores = tl.dot(k2, tl.trans(q2), scores, input_precision="ieee")
            if RAGGED:
                weights = tl.math.exp2(scores * scale + bias[:, None] - norm[None, :])
            else:
                weights = tl.math.exp2(scores * scale - (norm - weight)[None, :])
            if VALUES:
                low = weights.to(q.dtype.element_ty)
                dv1 = tl.dot(low, g1, dv1, input_precision="ieee")
                if D2:
                    dv2 = tl.dot(low, g2, dv2, input_precision="ieee")
            if KEYS:
                sums = tl.load(delta + place, mask=column < left, other=0.0)
                slope = tl.dot(v1, tl.trans(g1), input_precision="ieee")
                if D2:
                    slope = tl.dot(v2, tl.trans(g2), slope, input_precision="ieee")
                slope = (weights * (slope - sums[None, :])).to(q.dtype.element_ty)
                dk1 = tl.dot(slope, q1, dk1, input_precision="ieee")
                if D2:
                    dk2 = tl.dot(slope, q2, dk2, input_precision="ieee")
            start += tall * q_n
            outer += tall * g_n
            place += BM * heads

    target = ((image * size + first) * heads + head) * D
    if KEYS:
        dk1 *= scale * LN2
        if COARSE:
            dk1 += shares(
                dk_1, dk_2, image, head, heads, first + row, size, level_1, level_2, h, w,
                0, D1, D, COARSE,
            )  # fmt: skip
        put(dk + target, dk1, rest, heads * D, BN, 0, D1, D)
        if D2:
            dk2 *= scale * LN2
            if COARSE:
                dk2 += shares(
                    dk_1, dk_2, image, head, heads, first + row, size, level_1, level_2, h, w,
                    D1, D2, D, COARSE,
                )  # fmt: skip
            put(dk + target, dk2, rest, heads * D, BN, D1, D2, D)
    if VALUES:
        if COARSE:
            dv1 += shares(
                dv_1, dv_2, image, head, heads, first + row, size, level_1, level_2, h, w,
                0, D1, D, COARSE,
            )  # fmt: skip
        put(dv + target, dv1, rest, heads * D, BN, 0, D1, D)
        if D2:
            if COARSE:
                dv2 += shares(
                    dv_1, dv_2, image, head, heads, first + row, size, level_1, level_2, h, w,
                    D1, D2, D, COARSE,
                )  # fmt: skip
            put(dv + target, dv2, rest, heads * D, BN, D1, D2, D)


@triton.jit
def shares(
    grad_1, grad_2, image, head, heads, token, tokens, level_1, level_2, h, w,
    START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, COARSE: tl.constexpr,
):  # fmt: skip
    """What tokens take of the gradients of their cells at all coarse levels."""
    x = share(grad_1, image, head, heads, token, tokens, level_1, h, w, START, WIDTH, D)
    if COARSE == 2:
        x += share(grad_2, image, head, heads, token, tokens, level_2, h, w, START, WIDTH, D)
    return x


@triton.jit
def share(
    grad, image, head, heads, token, tokens, level, h, w,
    START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """What each token takes of the gradient of its cell: the adjoint of the average."""
    across = tl.cdiv(w, level)
    cell = token // w // level * across + token % w // level
    count = counted(cell, level, h, w)
    column = START + tl.arange(0, WIDTH)[None, :]
    at = (image * (tl.cdiv(h, level) * across) + cell)[:, None] * heads + head
    inside = (token < tokens)[:, None] & (column < D)
    return tl.load(grad + at * D + column, mask=inside, other=0.0) / count[:, None]
