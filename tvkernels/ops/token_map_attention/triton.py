"""Cross-attention that walks the heads of a tile of queries: their mean map stays in registers.

A chosen word's probability is worked out again from its own key once the row's maximum and sum are
known, so that neither the whole map nor a search through it is needed.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from tvkernels._dispatch import PLAIN
from tvkernels._triton import support
from tvkernels._triton.configs import cdiv, choose, next_power_of_2
from tvkernels._triton.launch import arch, launch
from tvkernels._triton.maths import split

WGMMA = ("_attend",)  # kernels that must use it on sm_90 in 16 bits
NARROWEST = 16  # smallest side of a matrix product
WIDEST = 32  # words that one program maps; more words take more programs
LARGEST = 2**31 - 1
UNROLLED = 2  # whole tiles of text to which the loop over heads stays the innermost one


def why_not(q, k, v, tokens, scale) -> list[str]:
    """Reasons against this call."""
    reasons = support.why_not(q, k, v, tokens, matrices=True)
    # Rows of one frame and text are int32: in int64 they took head dim 160 over its registers.
    if any(x.shape[-3] * x.stride(-3) > LARGEST for x in (q, k, v)):
        reasons.append(f"a head of one frame or text spans more than {LARGEST} elements")
    return reasons


def forward(q, k, v, tokens, scale):
    """Shapes as in `tvkernels.token_map_attention`; a word outside the text gives a map of NaN."""
    b, f, n, h, d = q.shape
    length, words = k.shape[1], tokens.shape[0]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    maps = torch.empty((b, f, n, words), dtype=q.dtype, device=q.device)
    if not q.numel():
        return out, maps.zero_()
    config = choose(
        "token_map_attention", "_attend", arch=arch(q), dtype=str(q.dtype)[6:], head_dim=d
    )
    chunk, tail = split(d)
    block = config["BLOCK_L"]
    align = _alignment(d, q, k, v)
    width = min(WIDEST, _tile(words))
    groups = cdiv(words, width) if words else 1
    strides = {
        f"{name}_{axis}": stride
        for name, x, axes in (("q", q, "bfnhd"), ("k", k, "blhd"), ("v", v, "blhd"))
        for axis, stride in zip(axes, x.stride(), strict=True)
    }
    launch(
        _attend,
        (b * f * cdiv(n, config["BLOCK_M"]) * groups,),
        {
            "q": q, "k": k, "v": v, "tokens": tokens, "out": out, "maps": maps, "frames": f,
            "queries": n, "heads": h, "length": length, "full": length // block, "words": words,
            "groups": groups, "tokens_s": tokens.stride(0),
            "factor": (d**-0.5 if scale is None else scale) * math.log2(math.e),
        }
        | strides,
        config,
        HEAD_DIM=d,
        CHUNK=chunk,
        TAIL=tail,
        REST=_tile(length % block),
        UNROLL=length // block if length // block <= UNROLLED else -1,
        WORDS=width,
        ALIGN=align,
        BYTES=align * q.element_size(),
    )  # fmt: skip
    return out, maps


def _tile(size: int) -> int:
    """Side of the tile of a matrix product that holds `size`, 0 for none."""
    return max(NARROWEST, next_power_of_2(size)) if size > 0 else 0


def _alignment(d, *tensors) -> int:
    """Elements, at most 16 bytes of them, that the start of every head is aligned to.

    Triton itself knows of multiples of 16 elements only, and a head of 40 is none.
    """
    if any(x.stride(-1) != 1 for x in tensors):
        return 1
    # A tensor from elsewhere may begin anywhere: its address counts, not its place in a storage.
    starts = [
        x.data_ptr() // x.element_size() if type(x) in PLAIN else x.storage_offset()
        for x in tensors
    ]
    steps = starts + [s for x in tensors for s in x.stride()[:-1]]
    return math.gcd(16 // tensors[0].element_size(), d, *steps)


@triton.jit
def _rows(
    x, place, inside, x_d, left, WIDTH: tl.constexpr, WHOLE: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """[rows, WIDTH] from x on, where `left` columns of the head are left; WHOLE: enough.

    `inside` None says that all rows exist.
    """
    column = tl.arange(0, WIDTH)[None, :]
    place = tl.multiple_of(place[:, None], [ALIGN, ALIGN]) + column * x_d
    if inside is None:
        if WHOLE:
            rows = tl.load(x + place)
        else:
            rows = tl.load(x + place, mask=column < left, other=0.0)
    else:
        inside = inside[:, None]
        if not WHOLE:
            inside = inside & (column < left)
        rows = tl.load(x + place, mask=inside, other=0.0)
    return rows


@triton.jit
def _scores(
    q, q_row, present, q_d, q1, q2, k, place, inside, factor, k_d, HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr, TAIL: tl.constexpr, SLICE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Scores [queries, rows of k] in units of log 2.

    Products in float32 hold a whole row of both sides in registers: they go by slices, of which
    those of q are read again.
    """
    if SLICE:
        scores = tl.zeros([q_row.shape[0], place.shape[0]], tl.float32)
        for start in range(0, HEAD_DIM, SLICE):
            rows = _rows(
                q + start * q_d,
                q_row,
                present,
                q_d,
                HEAD_DIM - start,
                SLICE,
                HEAD_DIM % SLICE == 0,
                ALIGN,
            )
            part = _rows(
                k + start * k_d,
                place,
                inside,
                k_d,
                HEAD_DIM - start,
                SLICE,
                HEAD_DIM % SLICE == 0,
                ALIGN,
            )
            scores = tl.dot(rows, tl.trans(part), scores, input_precision="ieee")
    else:
        part = _rows(k, place, inside, k_d, HEAD_DIM, CHUNK, CHUNK <= HEAD_DIM, ALIGN)
        scores = tl.dot(q1, tl.trans(part), input_precision="ieee")
        if TAIL:
            part = _rows(
                k + CHUNK * k_d,
                place,
                inside,
                k_d,
                HEAD_DIM - CHUNK,
                TAIL,
                CHUNK + TAIL <= HEAD_DIM,
                ALIGN,
            )
            scores += tl.dot(q2, tl.trans(part), input_precision="ieee")
    return scores * factor


@triton.jit
def _absorb(
    q, q_row, present, q_d, q1, q2, k, v, k_at, v_at, start, length, factor,
    top, total, sum1, sum2, k_l, k_d, v_l, v_d, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
    HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr, SLICE: tl.constexpr,
    ALIGN: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """One tile of text into the online softmax."""
    row = start + tl.arange(0, WIDTH)
    inside = None
    if not WHOLE:
        inside = row < length
    scores = _scores(
        q, q_row, present, q_d, q1, q2, tl.multiple_of(k + k_at, BYTES), row * k_l, inside, factor,
        k_d, HEAD_DIM, CHUNK, TAIL, SLICE, ALIGN,
    )  # fmt: skip
    if not WHOLE:
        scores = tl.where(inside[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    rescale = tl.math.exp2(top - higher)
    p = tl.math.exp2(scores - higher[:, None])
    total = total * rescale + tl.sum(p, 1)
    p = p.to(v.dtype.element_ty)
    v = tl.multiple_of(v + v_at, BYTES)
    place = row * v_l
    part = _rows(v, place, inside, v_d, HEAD_DIM, CHUNK, CHUNK <= HEAD_DIM, ALIGN)
    sum1 = tl.dot(p, part, sum1 * rescale[:, None], input_precision="ieee")
    if TAIL:
        part = _rows(
            v + CHUNK * v_d,
            place,
            inside,
            v_d,
            HEAD_DIM - CHUNK,
            TAIL,
            CHUNK + TAIL <= HEAD_DIM,
            ALIGN,
        )
        sum2 = tl.dot(p, part, sum2 * rescale[:, None], input_precision="ieee")
    return higher, total, sum1, sum2


@triton.jit
def _attend(
    q, k, v, tokens, out, maps, frames, queries, heads, length, full, words, groups, factor,
    q_b, q_f, q_n, q_h, q_d, k_b, k_l, k_h, k_d, v_b, v_l, v_h, v_d, tokens_s,
    HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr, REST: tl.constexpr,
    UNROLL: tl.constexpr, WORDS: tl.constexpr, ALIGN: tl.constexpr, BYTES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """All heads of a tile of one frame's queries, and one group of words.

    The text is `full` tiles of BLOCK_L (UNROLL of them, known here, unless that is -1) and one of
    REST.
    """
    group = tl.program_id(0) % groups
    tile = tl.program_id(0) // groups
    tiles = tl.cdiv(queries, BLOCK_M)
    image = (tile // tiles).to(tl.int64)
    batch = image // frames
    row = (tile % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    present = row < queries
    q_at = batch * q_b + image % frames * q_f
    out_row = row[:, None] * (heads * HEAD_DIM)
    out_at = image * queries * heads * HEAD_DIM
    k_at = batch * k_b
    v_at = batch * v_b
    if WORDS:
        word = group * WORDS + tl.arange(0, WORDS)
        token = tl.load(tokens + word * tokens_s, mask=word < words, other=0).to(tl.int32)
        known = (token >= 0) & (token < length)
        seen = tl.zeros([BLOCK_M, WORDS], tl.float32)
    q_row = row * q_n
    # Addresses kept from head to head took head dim 160 over its registers by 8 bytes.
    for _ in tl.range(heads, disable_licm=True):
        q_head = tl.multiple_of(q + q_at, BYTES)
        q1 = _rows(q_head, q_row, present, q_d, HEAD_DIM, CHUNK, CHUNK <= HEAD_DIM, ALIGN)
        q2 = q1
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        sum1 = tl.zeros([BLOCK_M, CHUNK], tl.float32)
        sum2 = sum1
        if TAIL:
            q2 = _rows(
                q_head + CHUNK * q_d,
                q_row,
                present,
                q_d,
                HEAD_DIM - CHUNK,
                TAIL,
                CHUNK + TAIL <= HEAD_DIM,
                ALIGN,
            )
            sum2 = tl.zeros([BLOCK_M, TAIL], tl.float32)
        if UNROLL >= 0:
            for i in tl.static_range(UNROLL):
                top, total, sum1, sum2 = _absorb(
                    q_head, q_row, present, q_d, q1, q2, k, v, k_at, v_at, i * BLOCK_L,
                    length, factor, top, total, sum1, sum2, k_l, k_d, v_l, v_d, BLOCK_L,
                    True, HEAD_DIM, CHUNK, TAIL, SLICE, ALIGN, BYTES,
                )  # fmt: skip
        else:
            for i in range(full):
                top, total, sum1, sum2 = _absorb(
                    q_head, q_row, present, q_d, q1, q2, k, v, k_at, v_at, i * BLOCK_L,
                    length, factor, top, total, sum1, sum2, k_l, k_d, v_l, v_d, BLOCK_L,
                    True, HEAD_DIM, CHUNK, TAIL, SLICE, ALIGN, BYTES,
                )  # fmt: skip
        if REST:
            top, total, sum1, sum2 = _absorb(
                q_head, q_row, present, q_d, q1, q2, k, v, k_at, v_at, full * BLOCK_L,
                length, factor, top, total, sum1, sum2, k_l, k_d, v_l, v_d, REST, False,
                HEAD_DIM, CHUNK, TAIL, SLICE, ALIGN, BYTES,
            )  # fmt: skip
        share = 1 / total
        column = tl.arange(0, CHUNK)[None, :]
        start = tl.multiple_of(out + out_at, BYTES)
        place = tl.multiple_of(out_row, [ALIGN, ALIGN]) + column
        inside = (present & (group == 0))[:, None]
        found = (sum1 * share[:, None]).to(out.dtype.element_ty)
        tl.store(start + place, found, mask=inside & (column < HEAD_DIM))
        if TAIL:
            column = CHUNK + tl.arange(0, TAIL)[None, :]
            place = tl.multiple_of(out_row, [ALIGN, ALIGN]) + column
            found = (sum2 * share[:, None]).to(out.dtype.element_ty)
            tl.store(start + place, found, mask=inside & (column < HEAD_DIM))
        if WORDS:
            start = tl.multiple_of(k + k_at, BYTES)
            scores = _scores(
                q_head, q_row, present, q_d, q1, q2, start, token * k_l, known, factor, k_d,
                HEAD_DIM, CHUNK, TAIL, SLICE, ALIGN,
            )  # fmt: skip
            seen += tl.math.exp2(scores - top[:, None]) * share[:, None]
        q_at += q_h
        k_at += k_h
        v_at += v_h
        out_at += HEAD_DIM
    if WORDS:
        seen = tl.where(known[None, :], seen / heads, float("nan"))
        place = image * queries * words + row[:, None] * words + word[None, :]
        inside = present[:, None] & (word < words)[None, :]
        tl.store(maps + place, seen.to(maps.dtype.element_ty), mask=inside)
