"""Attention over frames, tensors read in place: one pass to 32 frames, online softmax beyond."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from tvkernels._triton import support
from tvkernels._triton.configs import cdiv, choose, next_power_of_2
from tvkernels._triton.launch import arch, launch

ONE_PASS = 32  # frames that one program holds at once
NARROWEST = 16  # smallest side of a matrix product


def why_not(q, k, v, scale) -> list[str]:
    """Reasons against this call."""
    return support.why_not(q, k, v, matrices=True)


def forward(q, k, v, scale):
    """Shapes as in `tvkernels.temporal_attention`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    kernel = _attend if q.shape[1] <= ONE_PASS else _attend_online
    _launch(kernel, {"q": q, "k": k, "v": v, "out": out}, scale)
    return out


def why_not_backward(q, *args) -> list[str]:
    """Reasons against this backward where the forward runs.

    Without matrix instructions, five products of 32 x 32 spill registers at head dim 160.
    """
    most = NARROWEST if q.dtype == torch.float32 else ONE_PASS
    return [f"{q.shape[1]} frames are more than {most}"] if q.shape[1] > most else []


def backward(grads, q, k, v, scale):
    """Gradients of q, k and v in one kernel."""
    found = {f"d{name}": torch.empty_like(x) for name, x in (("q", q), ("k", k), ("v", v))}
    _launch(_differentiate, {"q": q, "k": k, "v": v, "grad": grads[0]} | found, scale)
    return list(found.values())


def _launch(kernel, tensors, scale):
    """Starts a kernel that reads and writes tensors of one shape [B, F, N, H, D]."""
    x = tensors["q"]
    b, f, n, h, d = x.shape
    if not x.numel():
        return
    frames = ONE_PASS if NARROWEST < f <= ONE_PASS else NARROWEST
    config = choose(
        "temporal_attention", kernel.fn.__name__, arch=arch(x), dtype=str(x.dtype)[6:],
        head_dim=d, frames=frames,
    )  # fmt: skip
    programs = cdiv(n * h, config["CELLS"]) * b
    if kernel is _attend_online:
        programs *= cdiv(f, config["QUERIES"])
    numbers = {"frames": f, "cells": n * h, "heads": h}
    numbers["scale"] = float(d**-0.5 if scale is None else scale)
    strides = {
        f"{name}_{axis}": stride
        for name, x in tensors.items()
        for axis, stride in zip("bfnhd", x.stride(), strict=True)
    }
    if kernel is _attend_online:
        config["CHUNK"] = max(NARROWEST, 1 << d.bit_length() - 1)
    launch(
        kernel,
        (programs,),
        tensors | numbers | strides,
        config,
        FRAMES=frames,
        HEAD_DIM=d,
        TAIL=max(NARROWEST, next_power_of_2(d % config["CHUNK"])),
        ALIGN=alignment(*tensors.values()),
    )


def alignment(*tensors):
    """Elements, at most 16 bytes of them, that all runs along the last axis are aligned to.

    Triton itself knows of multiples of 16 elements only, and a head of 40 is none.
    """
    if any(x.stride(-1) != 1 for x in tensors):
        return 1
    steps = [x.storage_offset() for x in tensors] + [s for x in tensors for s in x.stride()[:-1]]
    return math.gcd(16 // tensors[0].element_size(), *steps)


@triton.jit
def _place(batch, frame, cell, heads, x_b, x_f, x_n, x_h, ALIGN: tl.constexpr):
    """Offsets [frames, cells, 1] of heads; a cell is a position and a head."""
    place = (cell // heads).to(tl.int64) * x_n + (cell % heads).to(tl.int64) * x_h
    place = batch * x_b + frame.to(tl.int64)[:, None, None] * x_f + place[None, :, None]
    return tl.multiple_of(place, [ALIGN, ALIGN, ALIGN])


@triton.jit
def _all_frames(frames, cells, CELLS: tl.constexpr, FRAMES: tl.constexpr):
    """The program's batch, its frames, its block of cells, and which [frames, cells, 1] exist."""
    blocks = tl.cdiv(cells, CELLS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    cell = (tl.program_id(0) % blocks) * CELLS + tl.arange(0, CELLS)
    frame = tl.arange(0, FRAMES)
    inside = (frame < frames)[:, None, None] & (cell < cells)[None, :, None]
    return batch, frame, cell, inside


@triton.jit
def _columns(
    inside, START: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr
):
    """Columns [1, 1, width] of a head, and which elements [frames, cells, width] exist."""
    WIDTH: tl.constexpr = CHUNK if START + CHUNK <= HEAD_DIM else TAIL
    column = START + tl.arange(0, WIDTH)[None, None, :]
    if START + WIDTH > HEAD_DIM:
        inside = inside & (column < HEAD_DIM)
    return column, inside


@triton.jit
def _read(
    x, place, inside, x_d,
    START: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Some columns [cells, frames, width]; neighbouring threads take neighbouring cells."""
    column, inside = _columns(inside, START, HEAD_DIM, CHUNK, TAIL)
    return tl.load(x + place + column * x_d, mask=inside, other=0.0).permute(1, 0, 2)


@triton.jit
def _write(
    x, values, place, inside, x_d,
    START: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Writes [cells, frames, width] where `_read` reads it."""
    column, inside = _columns(inside, START, HEAD_DIM, CHUNK, TAIL)
    values = values.to(x.dtype.element_ty).permute(1, 0, 2)
    tl.store(x + place + column * x_d, values, mask=inside)


@triton.jit
def _dot(x, y):
    """Products of cells' matrices; TF32 would break the error budget."""
    return tl.dot(x, y, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def _transposed(x):
    return x.permute(0, 2, 1)


@triton.jit(do_not_specialize=["frames"])
def _attend(
    q, k, v, out, frames, cells, heads, scale,
    q_b, q_f, q_n, q_h, q_d, k_b, k_f, k_n, k_h, k_d,
    v_b, v_f, v_n, v_h, v_d, out_b, out_f, out_n, out_h, out_d,
    CELLS: tl.constexpr, FRAMES: tl.constexpr, HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A block of cells with all their frames; a head is cut into CHUNK columns and a TAIL."""
    batch, frame, cell, inside = _all_frames(frames, cells, CELLS, FRAMES)
    q_at = _place(batch, frame, cell, heads, q_b, q_f, q_n, q_h, ALIGN)
    k_at = _place(batch, frame, cell, heads, k_b, k_f, k_n, k_h, ALIGN)
    v_at = _place(batch, frame, cell, heads, v_b, v_f, v_n, v_h, ALIGN)
    out_at = _place(batch, frame, cell, heads, out_b, out_f, out_n, out_h, ALIGN)
    scores = tl.zeros([CELLS, FRAMES, FRAMES], tl.float32)
    for i in tl.static_range(0, HEAD_DIM, CHUNK):
        x = _read(q, q_at, inside, q_d, i, HEAD_DIM, CHUNK, TAIL)
        y = _read(k, k_at, inside, k_d, i, HEAD_DIM, CHUNK, TAIL)
        scores += _dot(x, _transposed(y))
    shares = _softmax(scores, frame < frames, scale).to(v.dtype.element_ty)
    for i in tl.static_range(0, HEAD_DIM, CHUNK):
        x = _dot(shares, _read(v, v_at, inside, v_d, i, HEAD_DIM, CHUNK, TAIL))
        _write(out, x, out_at, inside, out_d, i, HEAD_DIM, CHUNK, TAIL)


@triton.jit
def _softmax(scores, known, scale):
    """Softmax over the known ones of the last axis, of scores times scale."""
    scores = tl.where(known[None, None, :], scores * (scale * 1.4426950408889634), float("-inf"))
    powers = tl.math.exp2(scores - tl.max(scores, 2)[:, :, None])
    return powers * (1.0 / tl.sum(powers, 2))[:, :, None]


@triton.jit(do_not_specialize=["frames"])
def _attend_online(
    q, k, v, out, frames, cells, heads, scale,
    q_b, q_f, q_n, q_h, q_d, k_b, k_f, k_n, k_h, k_d,
    v_b, v_f, v_n, v_h, v_d, out_b, out_f, out_n, out_h, out_d,
    CELLS: tl.constexpr, QUERIES: tl.constexpr, FRAMES: tl.constexpr, HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """QUERIES frames of a block of cells; the others come in blocks of FRAMES."""
    steps = tl.cdiv(frames, QUERIES)
    blocks = tl.cdiv(cells, CELLS)
    # The blocks of queries of one block of cells follow each other: its keys are in cache.
    query = (tl.program_id(0) % steps) * QUERIES + tl.arange(0, QUERIES)
    batch = (tl.program_id(0) // steps // blocks).to(tl.int64)
    cell = (tl.program_id(0) // steps % blocks) * CELLS + tl.arange(0, CELLS)
    exists = (cell < cells)[None, :, None]
    asked = (query < frames)[:, None, None] & exists
    q_at = _place(batch, query, cell, heads, q_b, q_f, q_n, q_h, ALIGN)
    top = tl.full([CELLS, QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([CELLS, QUERIES], tl.float32)
    # Loops carry no list of tensors, so that a head is one CHUNK and one TAIL here.
    head = tl.zeros([CELLS, QUERIES, CHUNK], tl.float32)
    tail = tl.zeros([CELLS, QUERIES, TAIL], tl.float32)
    frame = tl.arange(0, FRAMES)
    for _ in range(tl.cdiv(frames, FRAMES)):
        inside = (frame < frames)[:, None, None] & exists
        k_at = _place(batch, frame, cell, heads, k_b, k_f, k_n, k_h, ALIGN)
        v_at = _place(batch, frame, cell, heads, v_b, v_f, v_n, v_h, ALIGN)
        x = _read(q, q_at, asked, q_d, 0, HEAD_DIM, CHUNK, TAIL)
        y = _read(k, k_at, inside, k_d, 0, HEAD_DIM, CHUNK, TAIL)
        scores = _dot(x, _transposed(y))
        if CHUNK < HEAD_DIM:
            x = _read(q, q_at, asked, q_d, CHUNK, HEAD_DIM, CHUNK, TAIL)
            y = _read(k, k_at, inside, k_d, CHUNK, HEAD_DIM, CHUNK, TAIL)
            scores += _dot(x, _transposed(y))
        scores *= scale * 1.4426950408889634
        scores = tl.where((frame < frames)[None, None, :], scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, 2))
        shrink = tl.math.exp2(top - highest)
        powers = tl.math.exp2(scores - highest[:, :, None])
        total = total * shrink + tl.sum(powers, 2)
        powers = powers.to(v.dtype.element_ty)
        y = _read(v, v_at, inside, v_d, 0, HEAD_DIM, CHUNK, TAIL)
        head = head * shrink[:, :, None] + _dot(powers, y)
        if CHUNK < HEAD_DIM:
            y = _read(v, v_at, inside, v_d, CHUNK, HEAD_DIM, CHUNK, TAIL)
            tail = tail * shrink[:, :, None] + _dot(powers, y)
        top = highest
        frame += FRAMES
    out_at = _place(batch, query, cell, heads, out_b, out_f, out_n, out_h, ALIGN)
    share = (1.0 / total)[:, :, None]
    _write(out, head * share, out_at, asked, out_d, 0, HEAD_DIM, CHUNK, TAIL)
    if CHUNK < HEAD_DIM:
        _write(out, tail * share, out_at, asked, out_d, CHUNK, HEAD_DIM, CHUNK, TAIL)


@triton.jit(do_not_specialize=["frames"])
def _differentiate(
    q, k, v, grad, dq, dk, dv, frames, cells, heads, scale,
    q_b, q_f, q_n, q_h, q_d, k_b, k_f, k_n, k_h, k_d, v_b, v_f, v_n, v_h, v_d,
    grad_b, grad_f, grad_n, grad_h, grad_d, dq_b, dq_f, dq_n, dq_h, dq_d,
    dk_b, dk_f, dk_n, dk_h, dk_d, dv_b, dv_f, dv_n, dv_h, dv_d,
    CELLS: tl.constexpr, FRAMES: tl.constexpr, HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """All gradients of a block of cells; the second pass over q, k and grad is from cache."""
    batch, frame, cell, inside = _all_frames(frames, cells, CELLS, FRAMES)
    q_at = _place(batch, frame, cell, heads, q_b, q_f, q_n, q_h, ALIGN)
    k_at = _place(batch, frame, cell, heads, k_b, k_f, k_n, k_h, ALIGN)
    v_at = _place(batch, frame, cell, heads, v_b, v_f, v_n, v_h, ALIGN)
    grad_at = _place(batch, frame, cell, heads, grad_b, grad_f, grad_n, grad_h, ALIGN)
    dq_at = _place(batch, frame, cell, heads, dq_b, dq_f, dq_n, dq_h, ALIGN)
    dk_at = _place(batch, frame, cell, heads, dk_b, dk_f, dk_n, dk_h, ALIGN)
    dv_at = _place(batch, frame, cell, heads, dv_b, dv_f, dv_n, dv_h, ALIGN)
    scores = tl.zeros([CELLS, FRAMES, FRAMES], tl.float32)
    slopes = tl.zeros([CELLS, FRAMES, FRAMES], tl.float32)
    for i in tl.static_range(0, HEAD_DIM, CHUNK):
        x = _read(q, q_at, inside, q_d, i, HEAD_DIM, CHUNK, TAIL)
        y = _read(k, k_at, inside, k_d, i, HEAD_DIM, CHUNK, TAIL)
        scores += _dot(x, _transposed(y))
        x = _read(grad, grad_at, inside, grad_d, i, HEAD_DIM, CHUNK, TAIL)
        y = _read(v, v_at, inside, v_d, i, HEAD_DIM, CHUNK, TAIL)
        slopes += _dot(x, _transposed(y))
    shares = _softmax(scores, frame < frames, scale)
    # The row sum of shares * slopes is the product of the output and its gradient.
    slopes = shares * (slopes - tl.sum(shares * slopes, 2)[:, :, None])
    slopes = slopes.to(q.dtype.element_ty)
    shares = _transposed(shares.to(q.dtype.element_ty))
    for i in tl.static_range(0, HEAD_DIM, CHUNK):
        x = _read(grad, grad_at, inside, grad_d, i, HEAD_DIM, CHUNK, TAIL)
        _write(dv, _dot(shares, x), dv_at, inside, dv_d, i, HEAD_DIM, CHUNK, TAIL)
        x = _read(k, k_at, inside, k_d, i, HEAD_DIM, CHUNK, TAIL)
        _write(dq, _dot(slopes, x) * scale, dq_at, inside, dq_d, i, HEAD_DIM, CHUNK, TAIL)
        x = _dot(_transposed(slopes), _read(q, q_at, inside, q_d, i, HEAD_DIM, CHUNK, TAIL))
        _write(dk, x * scale, dk_at, inside, dk_d, i, HEAD_DIM, CHUNK, TAIL)
