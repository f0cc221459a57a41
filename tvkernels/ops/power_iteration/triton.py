"""Power iteration in few launches: one for a small weight, else two a step and one to end.

A weight of SD-1.x is 3.3 MB at most, a microsecond of memory time: launches decide. The product
kernel serves W^T and W by exchanged strides, divides its input by its norm as it reads it, and
leaves its result as it is, with a sum of squares from each program for the next launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tvkernels._triton import support
from tvkernels._triton.configs import cdiv, choose
from tvkernels._triton.launch import arch, launch

NAME = "power_iteration"


def why_not(weight, u, steps) -> list[str]:
    """Reasons against this call."""
    return support.why_not(weight, u)


def forward(weight, u, steps):
    """Shapes as in `tvkernels.power_iteration`.

    The norms of W^T u, W v, W^T u, ... never fall (Cauchy-Schwarz). So a product is zero only
    where all before it were, and the vector that it keeps is the first there was.
    """
    rows, columns = weight.shape
    found = [torch.empty(n, dtype=torch.float32, device=weight.device) for n in (rows, columns)]
    start = max(columns, 1) ** -0.5
    if not weight.numel():
        return found[0].copy_(u), found[1].fill_(start)
    results = {"u": found[0], "v": found[1], "rows": rows, "columns": columns, "start": start}
    first = {"first": u, "first_s": u.stride(0)}
    config = choose(NAME, "_iterate", arch=arch(weight), dtype=str(weight.dtype)[6:])
    if max(rows, columns) <= config["SIDE"]:
        strides = {"weight_o": weight.stride(0), "weight_i": weight.stride(1)}
        raw = torch.empty_like(found[0])
        given = {"weight": weight, "raw": raw, "steps": steps}
        launch(_iterate, (1,), given | first | results | strides, config)
        return tuple(found)
    left = {"x": u, "x_s": u.stride(0), "squares": None, "parts": 0}
    for _ in range(steps):
        # Where W v is zero, so is W^T u of the u that it keeps: zero serves as well.
        right = _product(weight.mT, left, 0.0)
        left = _product(weight, right, start)
    config = choose(NAME, "_finish", arch=arch(weight))
    ends = {
        "u_raw": left["x"], "u_squares": left["squares"], "u_parts": left["parts"],
        "v_raw": right["x"], "v_squares": right["squares"], "v_parts": right["parts"],
    }  # fmt: skip
    grid = (cdiv(max(rows, columns), config["BLOCK"]),)
    launch(_finish, grid, ends | first | results, config)
    return tuple(found)


def _product(matrix: Tensor, vector: dict, kept: float) -> dict:
    """The matrix times a vector over its norm, as the next product takes its vector.

    A vector of zeros has `kept` for components instead.
    """
    rows, inner = matrix.shape
    order = "rows" if matrix.stride(0) == 1 and rows > 1 else "inner"
    config = choose(NAME, "_multiply", arch=arch(matrix), dtype=str(matrix.dtype)[6:], order=order)
    programs = cdiv(rows, config["ROWS"])
    y, sums = (torch.empty(n, dtype=torch.float32, device=matrix.device) for n in (rows, programs))
    numbers = {"rows": rows, "inner": inner, "kept": kept}
    strides = {"matrix_r": matrix.stride(0), "matrix_i": matrix.stride(1)}
    given = {"matrix": matrix, "y": y, "y_squares": sums}
    launch(_multiply, (programs,), given | vector | numbers | strides, config)
    return {"x": y, "x_s": 1, "squares": sums, "parts": programs}


@triton.jit
def _norm(squares, parts, LANES: tl.constexpr):
    """The norm of a vector from its sums of squares."""
    lane = tl.arange(0, LANES)
    total = tl.zeros([LANES], tl.float32)
    for begin in range(0, parts, LANES):
        total += tl.load(squares + begin + lane, mask=begin + lane < parts, other=0.0)
    return tl.sqrt_rn(tl.sum(total, 0))


@triton.jit
def _unit(x, norm, previous):
    """x over its norm, and what there was where that is zero."""
    return tl.where(norm > 0, x * (1 / tl.where(norm > 0, norm, 1.0)), previous)


@triton.jit(do_not_specialize=["parts"])
def _multiply(
    matrix, x, squares, y, y_squares, rows, inner, parts, kept, x_s, matrix_r, matrix_i,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """ROWS values of y = M x / |x| and their sum of squares; x itself where no `squares` come."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    start_of_row = matrix + row.to(tl.int64)[:, None] * matrix_r
    if squares is not None:
        norm = _norm(squares, parts, CHUNK)
    total = tl.zeros([ROWS, CHUNK], tl.float32)
    for begin in range(0, inner, CHUNK):
        column = begin + tl.arange(0, CHUNK)
        known = column < inner
        place = start_of_row + column.to(tl.int64)[None, :] * matrix_i
        part = tl.load(place, mask=exists[:, None] & known[None, :], other=0.0)
        value = tl.load(x + column * x_s, mask=known, other=0.0).to(tl.float32)
        if squares is not None:
            value = _unit(value, norm, kept)
        total += part.to(tl.float32) * value[None, :]
    found = tl.sum(total, 1)
    tl.store(y + row, found, mask=exists)
    tl.store(y_squares + tl.program_id(0), tl.sum(found * found, 0))


@triton.jit(do_not_specialize=["u_parts", "v_parts"])
def _finish(
    u_raw, u_squares, v_raw, v_squares, first, u, v, rows, columns, u_parts, v_parts, start,
    first_s, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of u and of v: the last products over their norms."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < columns
    x = tl.load(v_raw + lane, mask=inside, other=0.0)
    tl.store(v + lane, _unit(x, _norm(v_squares, v_parts, BLOCK), start), mask=inside)
    inside = lane < rows
    x = tl.load(u_raw + lane, mask=inside, other=0.0)
    previous = tl.load(first + lane * first_s, mask=inside, other=0.0).to(tl.float32)
    tl.store(u + lane, _unit(x, _norm(u_squares, u_parts, BLOCK), previous), mask=inside)


@triton.jit(do_not_specialize=["steps"])
def _iterate(
    weight, first, raw, u, v, steps, rows, columns, start, first_s, weight_o, weight_i,
    ROWS: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """All steps in one program: v stays in registers, u goes from thread to thread by memory."""
    column = tl.arange(0, SIDE)
    known = column < columns
    lane = tl.arange(0, SIDE)
    exists = lane < rows
    previous = tl.load(first + lane * first_s, mask=exists, other=0.0).to(tl.float32)
    tl.store(u + lane, previous, mask=exists)
    right = tl.zeros([SIDE], tl.float32) + start
    place = weight + column.to(tl.int64)[None, :] * weight_i
    for _ in range(steps):
        tl.debug_barrier()  # u is written
        total = tl.zeros([ROWS, SIDE], tl.float32)
        for begin in range(0, rows, ROWS):
            row = begin + tl.arange(0, ROWS)
            inside = (row < rows)[:, None] & known[None, :]
            part = tl.load(place + row.to(tl.int64)[:, None] * weight_o, mask=inside, other=0.0)
            left = tl.load(u + row, mask=row < rows, other=0.0)
            total += part.to(tl.float32) * left[:, None]
        product = tl.sum(total, 0)
        right = _unit(product, tl.sqrt_rn(tl.sum(product * product, 0)), right)
        for begin in range(0, rows, ROWS):
            row = begin + tl.arange(0, ROWS)
            inside = (row < rows)[:, None] & known[None, :]
            part = tl.load(place + row.to(tl.int64)[:, None] * weight_o, mask=inside, other=0.0)
            tl.store(raw + row, tl.sum(part.to(tl.float32) * right[None, :], 1), mask=row < rows)
        tl.debug_barrier()  # the products are written
        whole = tl.load(raw + lane, mask=exists, other=0.0)
        norm = tl.sqrt_rn(tl.sum(whole * whole, 0))
        tl.store(u + lane, _unit(whole, norm, previous), mask=exists)
    tl.store(v + column, right, mask=known)
