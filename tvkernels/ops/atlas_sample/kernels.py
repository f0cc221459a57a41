"""Kernels that atlas_sample and atlas_splat share: bilinear reads, and sums into texels.

Sums into texels are atomic, yet the same bits every time: they are of 64-bit integers, in units of
2^-62 of the largest sum that could arise, so that neither order nor size loses a digit of float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tvkernels._triton.configs import cdiv, choose
from tvkernels._triton.launch import arch, launch

UNALIGNED = ("points", "channels", "height", "width")
# A product of a value and its weights, rounded, is at most this much above the largest value.
HEADROOM = 4


def strides(**tensors: Tensor) -> dict[str, int]:
    """x_0, x_1, ... for every tensor x."""
    return {f"{n}_{i}": s for n, x in tensors.items() for i, s in enumerate(x.stride())}


def over_points(
    op: str, kernel, points: int, batches: int, x: Tensor, arguments: dict, **constants
):
    """Starts a program for each block of points of each batch."""
    config = choose(op, kernel.fn.__name__, arch=arch(x))
    launch(
        kernel, (batches * cdiv(points, config["BLOCK"]),), arguments | {"points": points},
        config, **constants,
    )  # fmt: skip


def unit(largest: Tensor | None, points: int, like: Tensor) -> Tensor:
    """float32 [1]: what one value is multiplied with before it is added to others as an integer.

    Args:
        largest: of the values, a tensor of one element, or None for weights, at most 1.
        points: that may fall on one texel.
    """
    steps = float(2 ** (62 - (HEADROOM * max(points, 1)).bit_length()))
    if largest is None:
        return torch.full((1,), steps, dtype=torch.float32, device=like.device)
    largest = largest.float().reshape(1)
    return torch.where(largest == 0, steps, steps / largest)  # NaN stays what it is


@triton.jit
def axis(place, size):
    """Number of the texel before a coordinate in [-1, 1], what lies behind it, and inside or 0."""
    x = ((place + 1) * size - 1) / 2
    last = (size - 1).to(tl.float32)
    inside = tl.where((x >= 0) & (x <= last), 1.0, 0.0)
    x = tl.minimum(tl.maximum(x, 0.0), last)
    first = tl.floor(x)
    return first.to(tl.int64), x - first, inside


@triton.jit
def _points(points, BLOCK: tl.constexpr):
    """Batch and numbers of a program's points."""
    blocks = tl.cdiv(points, BLOCK)
    i = tl.program_id(0)
    return (i // blocks).to(tl.int64), (i % blocks) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _look_up(uv, batch, p, points, height, width, uv_0, uv_1, uv_2):
    """Rows, columns and weights of the texels around each point, and where it is not clamped."""
    at = uv + batch * uv_0 + p.to(tl.int64) * uv_1
    u = tl.load(at, mask=p < points, other=0.0).to(tl.float32)
    v = tl.load(at + uv_2, mask=p < points, other=0.0).to(tl.float32)
    left, right, inside_x = axis(u, width)
    top, below, inside_y = axis(v, height)
    return left, right, inside_x, top, below, inside_y


@triton.jit(do_not_specialize=UNALIGNED)
def _sample(
    atlas, uv, out, points, channels, height, width, atlas_0, atlas_1, atlas_2, atlas_3,
    uv_0, uv_1, uv_2, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A block of points, some channels at a time."""
    batch, p = _points(points, BLOCK)
    left, right, _, top, below, _ = _look_up(uv, batch, p, points, height, width, uv_0, uv_1, uv_2)
    next_column = tl.where(left + 1 < width, atlas_2, 0).to(tl.int64)[:, None]
    next_row = tl.where(top + 1 < height, atlas_1, 0).to(tl.int64)[:, None]
    right = right[:, None]
    below = below[:, None]
    start = atlas + batch * atlas_0 + (top * atlas_1 + left * atlas_2)[:, None]
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)[None, :]
        inside = (p < points)[:, None] & (c < channels)
        at = start + c.to(tl.int64) * atlas_3
        a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(at + next_column, mask=inside, other=0.0).to(tl.float32)
        value = (a * (1 - right) + b * right) * (1 - below)
        a = tl.load(at + next_row, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(at + next_row + next_column, mask=inside, other=0.0).to(tl.float32)
        value += (a * (1 - right) + b * right) * below
        place = (batch * points + p.to(tl.int64))[:, None] * channels + c
        tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=UNALIGNED)
def _uv_gradient(
    atlas, uv, grad, duv, points, channels, height, width, atlas_0, atlas_1, atlas_2, atlas_3,
    uv_0, uv_1, uv_2, grad_0, grad_1, grad_2, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The lookup's slope, along which each point's gradient reaches its UV."""
    batch, p = _points(points, BLOCK)
    left, right, inside_x, top, below, inside_y = _look_up(
        uv, batch, p, points, height, width, uv_0, uv_1, uv_2
    )
    next_column = tl.where(left + 1 < width, atlas_2, 0).to(tl.int64)[:, None]
    next_row = tl.where(top + 1 < height, atlas_1, 0).to(tl.int64)[:, None]
    start = atlas + batch * atlas_0 + (top * atlas_1 + left * atlas_2)[:, None]
    du = tl.zeros([BLOCK], tl.float32)
    dv = tl.zeros([BLOCK], tl.float32)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)[None, :]
        inside = (p < points)[:, None] & (c < channels)
        at = grad + batch * grad_0 + p.to(tl.int64)[:, None] * grad_1 + c.to(tl.int64) * grad_2
        outer = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        at = start + c.to(tl.int64) * atlas_3
        a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(at + next_column, mask=inside, other=0.0).to(tl.float32)
        e = tl.load(at + next_row, mask=inside, other=0.0).to(tl.float32)
        f = tl.load(at + next_row + next_column, mask=inside, other=0.0).to(tl.float32)
        along_x = (b - a) * (1 - below[:, None]) + (f - e) * below[:, None]
        along_y = (e - a) * (1 - right[:, None]) + (f - b) * right[:, None]
        du += tl.sum(outer * along_x, 1)
        dv += tl.sum(outer * along_y, 1)
    place = duv + (batch * points + p.to(tl.int64)) * 2
    du *= inside_x * (width / 2)
    dv *= inside_y * (height / 2)
    tl.store(place, du.to(duv.dtype.element_ty), mask=p < points)
    tl.store(place + 1, dv.to(duv.dtype.element_ty), mask=p < points)


@triton.jit(do_not_specialize=UNALIGNED)
def _scatter(
    values, uv, weight, sums, scale, points, channels, height, width,
    values_0, values_1, values_2, uv_0, uv_1, uv_2, weight_0, weight_1,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, WEIGHTED: tl.constexpr, ONES: tl.constexpr,
):  # fmt: skip
    """Adds each point's values, or ONES in their place, to the four texels around it."""
    batch, p = _points(points, BLOCK)
    left, right, _, top, below, _ = _look_up(uv, batch, p, points, height, width, uv_0, uv_1, uv_2)
    share = tl.load(scale)
    if WEIGHTED:
        own = weight + batch * weight_0 + p.to(tl.int64) * weight_1
        share *= tl.load(own, mask=p < points, other=0.0).to(tl.float32)
    next_column = tl.where(left + 1 < width, channels, 0).to(tl.int64)[:, None]
    next_row = tl.where(top + 1 < height, width * channels, 0).to(tl.int64)[:, None]
    texel = (batch * height + top) * width + left
    start = sums + texel[:, None] * channels
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)[None, :]
        inside = (p < points)[:, None] & (c < channels)
        if ONES:
            value = tl.where(inside, 1.0, 0.0)
        else:
            at = values + batch * values_0 + p.to(tl.int64)[:, None] * values_1
            at += c.to(tl.int64) * values_2
            value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= share[:, None]
        else:
            value *= share
        upper = value * (1 - below)[:, None]
        lower = value * below[:, None]
        into = start + c
        near = (1 - right)[:, None]
        far = right[:, None]
        # Nothing is read here: ordered, each sum would wait for all memory and empty the L1.
        tl.atomic_add(into, (upper * near).to(tl.int64), mask=inside, sem="relaxed")
        tl.atomic_add(into + next_column, (upper * far).to(tl.int64), mask=inside, sem="relaxed")
        into += next_row
        tl.atomic_add(into, (lower * near).to(tl.int64), mask=inside, sem="relaxed")
        tl.atomic_add(into + next_column, (lower * far).to(tl.int64), mask=inside, sem="relaxed")


def scatter(op: str, values, uv, weight, height: int, width: int, scale: Tensor, ones=False):
    """int64 [B, height, width, C] sums of values x their weights x `scale`.

    Args:
        values: [B, P, C]; with `ones` only its shape's first two count, and C is 1.
        weight: [B, P], or None for 1 everywhere.
    """
    b, p, c = values.shape
    channels = 1 if ones else c
    sums = torch.zeros((b, height, width, channels), dtype=torch.int64, device=uv.device)
    given = weight if weight is not None else uv.select(2, 0)  # not read
    over_points(
        op, _scatter, p, b, uv,
        {
            "values": values, "uv": uv, "weight": given, "sums": sums, "scale": scale,
            "channels": channels, "height": height, "width": width,
        } | strides(values=values, uv=uv, weight=given),
        WEIGHTED=weight is not None, ONES=ones,
    )  # fmt: skip
    return sums
