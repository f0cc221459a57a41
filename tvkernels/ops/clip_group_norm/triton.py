"""Partial statistics, their merge, then one affine pass with SiLU: x is read twice, no more.

A group of a clip is large (655,360 values at 64 x 64, 320 channels, 16 frames) and groups are few,
so many programs share one: each takes a tile of channels and positions of one frame and leaves,
for each channel, the mean and the sum of centred squares, which merge without losing digits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tvkernels._triton import support
from tvkernels._triton.configs import cdiv, choose, next_power_of_2
from tvkernels._triton.launch import arch, launch

UNALIGNED = ("frames", "groups")  # sizes whose divisors change no address: not compiled for each


def why_not(x, weight, bias, groups, eps, silu) -> list[str]:
    """Reasons against this call."""
    return support.why_not(x, weight, bias)


def forward(x, weight, bias, groups, eps, silu):
    """Shapes as in `tvkernels.clip_group_norm`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        affine = _affine(x, weight, bias, groups, eps)
        _over_tiles(_normalise, {"x": x, "out": out}, affine, SILU=silu)
    return out


def backward(grads, x, weight, bias, groups, eps, silu):
    """Exact gradients in closed form: one more reduction, then one pass."""
    found = [torch.empty_like(t) if x.numel() else torch.zeros_like(t) for t in (x, weight, bias)]
    if not x.numel():
        return found
    dx, dweight, dbias = found
    b, f, c, h, w = x.shape
    size = c // groups
    affine = _affine(x, weight, bias, groups, eps)
    config = _config("_reduce_gradient", x)
    parts = f * cdiv(h * w, config["BLOCK_S"])
    sums = torch.empty((2, b, c, parts), dtype=torch.float32, device=x.device)
    constants = torch.empty((2, b, groups), dtype=torch.float32, device=x.device)
    inner = dict(zip(("totals", "products"), sums.unbind(), strict=True))
    lost = dict(zip(("constant", "slope"), constants.unbind(), strict=True))
    read = {"x": x, "grad": grads[0]}
    _over_tiles(_reduce_gradient, read, affine | inner, SILU=silu)
    config = choose("clip_group_norm", "_merge_gradient", arch=arch(x), size=size)
    config["BLOCK_G"] = max(config["BLOCK_G"], next_power_of_2(size))
    config["BLOCK_P"] = max(1, config.pop("BLOCK") // config["BLOCK_G"])
    launch(
        _merge_gradient,
        (groups,),
        inner
        | lost
        | {
            "weight": affine["weight"], "dweight": dweight, "dbias": dbias, "batches": b,
            "groups": groups, "size": size, "parts": parts, "count": f * size * h * w,
        },
        config,
    )  # fmt: skip
    _over_tiles(_differentiate, read | {"dx": dx}, affine | lost, SILU=silu)
    return found


def _affine(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> dict:
    """What all passes over x read: "mean" and "rstd" = 1 / sqrt(var + eps), [B, groups]."""
    b, f, c, h, w = x.shape
    block = _config("_partial_statistics", x)["BLOCK_S"]
    chunks = cdiv(h * w, block)
    partial = torch.empty((2, b, c, f, chunks), dtype=torch.float32, device=x.device)
    merged = torch.empty((2, b, groups), dtype=torch.float32, device=x.device)
    found = dict(zip(("mean", "rstd"), merged.unbind(), strict=True))
    inner = dict(zip(("means", "squares"), partial.unbind(), strict=True))
    _over_tiles(_partial_statistics, {"x": x}, inner)
    run = c // groups * f * chunks
    launch(
        _merge_statistics,
        (b * groups,),
        inner
        | {
            **found, "run": run, "chunks": chunks, "block": block, "positions": h * w,
            "count": f * c // groups * h * w, "eps": float(eps),
        },
        choose("clip_group_norm", "_merge_statistics", arch=arch(x)),
    )  # fmt: skip
    # Small, and nearly always contiguous already.
    return {
        "weight": weight.contiguous(), "bias": bias.contiguous(), "groups": groups, **found,
    }  # fmt: skip


def _over_tiles(kernel, clips: dict[str, Tensor], others: dict, **constants) -> None:
    """Starts a program for each tile of the clips, all [B, F, C, h, w]."""
    x = clips["x"]
    b, f, c, h, w = x.shape
    config = _config(kernel.fn.__name__, x)
    tiles = cdiv(c, config["BLOCK_C"]) * cdiv(h * w, config["BLOCK_S"])
    strides = {
        f"{name}_{axis}": stride
        for name, clip in clips.items()
        for axis, stride in zip("bfchw", clip.stride(), strict=True)
    }
    flat = all(h == 1 or clip.stride(3) == w * clip.stride(4) for clip in clips.values())
    launch(
        kernel,
        (b * f * tiles,),
        clips | others | strides | {"frames": f, "channels": c, "positions": h * w, "width": w},
        config,
        FLAT=flat,
        BY_CHANNEL=_order(x) == "channels",
        **constants,
    )


def _config(kernel: str, x: Tensor) -> dict[str, int]:
    return choose(
        "clip_group_norm", kernel, arch=arch(x), order=_order(x),
        positions=x.shape[3] * x.shape[4],
    )  # fmt: skip


def _order(x: Tensor) -> str:
    """What lies side by side in memory: "channels" (channels_last frames) or "positions"."""
    return "channels" if x.stride(2) == 1 and x.shape[2] > 1 else "positions"


@triton.jit
def _tile(
    frames, channels, positions, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    BY_CHANNEL: tl.constexpr, LAST_FIRST: tl.constexpr,
):  # fmt: skip
    """Batch, frame, channels, positions and number of positions' chunk of a program's tile.

    A pass that is LAST_FIRST begins with the tiles that the one before left in cache.
    """
    i = tl.program_id(0)
    if LAST_FIRST:
        i = tl.num_programs(0) - 1 - i
    blocks = tl.cdiv(channels, BLOCK_C)
    chunks = tl.cdiv(positions, BLOCK_S)
    image = i // (blocks * chunks)
    i = i % (blocks * chunks)
    if BY_CHANNEL:
        block = i % blocks
        chunk = i // blocks
    else:
        block = i // chunks
        chunk = i % chunks
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    s = chunk * BLOCK_S + tl.arange(0, BLOCK_S)
    return image // frames, image % frames, c, s, chunk


@triton.jit
def _at(x, batch, frame, c, s, width, x_b, x_f, x_c, x_h, x_w, FLAT: tl.constexpr):
    """Addresses of a tile [channels, positions]."""
    start = x + batch.to(tl.int64) * x_b + frame.to(tl.int64) * x_f
    if FLAT:
        place = s.to(tl.int64) * x_w
    else:
        place = (s // width).to(tl.int64) * x_h + (s % width).to(tl.int64) * x_w
    return start + c.to(tl.int64)[:, None] * x_c + place[None, :]


@triton.jit
def _read(
    x, batch, frame, c, s, channels, positions, width, x_b, x_f, x_c, x_h, x_w, FLAT: tl.constexpr
):  # fmt: skip
    """A tile [channels, positions] in float32, zero outside the clip."""
    place = _at(x, batch, frame, c, s, width, x_b, x_f, x_c, x_h, x_w, FLAT)
    inside = (c < channels)[:, None] & (s < positions)[None, :]
    return tl.load(place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _write(
    x, value, batch, frame, c, s, channels, positions, width, x_b, x_f, x_c, x_h, x_w,
    FLAT: tl.constexpr,
):  # fmt: skip
    """Writes a tile [channels, positions], nothing outside the clip."""
    place = _at(x, batch, frame, c, s, width, x_b, x_f, x_c, x_h, x_w, FLAT)
    inside = (c < channels)[:, None] & (s < positions)[None, :]
    tl.store(place, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _of_channels(values, batch, c, channels, groups):
    """[B, groups] read for each channel of a tile, [channels, 1]."""
    place = batch * groups + c // (channels // groups)
    return tl.load(values + place, mask=c < channels, other=0.0)[:, None]


@triton.jit
def _sigmoid(y):
    return 1 / (1 + tl.math.exp2(-1.4426950408889634 * y))


@triton.jit(do_not_specialize=UNALIGNED)
def _partial_statistics(
    x, means, squares, frames, channels, positions, width, x_b, x_f, x_c, x_h, x_w,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, FLAT: tl.constexpr, BY_CHANNEL: tl.constexpr,
):  # fmt: skip
    """Mean and sum of centred squares over the tile's positions, for each of its channels."""
    batch, frame, c, s, chunk = _tile(
        frames, channels, positions, BLOCK_C, BLOCK_S, BY_CHANNEL, False
    )
    value = _read(x, batch, frame, c, s, channels, positions, width, x_b, x_f, x_c, x_h, x_w, FLAT)
    count = tl.minimum(positions - chunk * BLOCK_S, BLOCK_S).to(tl.float32)
    mean = tl.div_rn(tl.sum(value, 1), tl.zeros([BLOCK_C], tl.float32) + count)
    centred = tl.where((s < positions)[None, :], value - mean[:, None], 0.0)
    part = ((batch * channels + c) * frames + frame) * tl.cdiv(positions, BLOCK_S) + chunk
    tl.store(means + part, mean, mask=c < channels)
    tl.store(squares + part, tl.sum(centred * centred, 1), mask=c < channels)


@triton.jit(do_not_specialize=["chunks", "block", "positions", "count"])
def _merge_statistics(
    means, squares, mean, rstd, run, chunks, block, positions, count, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    """One group's mean and 1 / sqrt(var + eps) from its run of partial ones."""
    group = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, run, BLOCK):
        i = start + lane
        size = tl.minimum(positions - i % chunks * block, block).to(tl.float32)
        total += size * tl.load(means + group * run + i, mask=i < run, other=0.0)
    centre = tl.sum(total, 0) / count
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, run, BLOCK):
        i = start + lane
        size = tl.minimum(positions - i % chunks * block, block).to(tl.float32)
        away = tl.load(means + group * run + i, mask=i < run, other=0.0) - centre
        square = tl.load(squares + group * run + i, mask=i < run, other=0.0)
        total += tl.where(i < run, square + size * away * away, 0.0)
    tl.store(mean + group, centre)
    tl.store(rstd + group, 1 / tl.sqrt_rn(tl.sum(total, 0) / count + eps))


@triton.jit(do_not_specialize=UNALIGNED)
def _normalise(
    x, out, weight, bias, mean, rstd, groups, frames, channels, positions, width,
    x_b, x_f, x_c, x_h, x_w, out_b, out_f, out_c, out_h, out_w,
    SILU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    FLAT: tl.constexpr, BY_CHANNEL: tl.constexpr,
):  # fmt: skip
    """A tile's affine map and SiLU."""
    batch, frame, c, s, _ = _tile(frames, channels, positions, BLOCK_C, BLOCK_S, BY_CHANNEL, True)
    value = _read(x, batch, frame, c, s, channels, positions, width, x_b, x_f, x_c, x_h, x_w, FLAT)
    scale = tl.load(weight + c, mask=c < channels, other=0.0).to(tl.float32)[:, None]
    shift = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[:, None]
    scale *= _of_channels(rstd, batch, c, channels, groups)
    y = (value - _of_channels(mean, batch, c, channels, groups)) * scale + shift
    if SILU:
        y *= _sigmoid(y)
    _write(
        out, y, batch, frame, c, s, channels, positions, width, out_b, out_f, out_c, out_h, out_w,
        FLAT,
    )  # fmt: skip


@triton.jit
def _outer(
    x, grad, weight, bias, mean, rstd, groups, batch, frame, c, s, channels, positions, width,
    x_b, x_f, x_c, x_h, x_w, grad_b, grad_f, grad_c, grad_h, grad_w,
    SILU: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """A tile's normalised values, and the gradient that reaches the affine map's result."""
    value = _read(x, batch, frame, c, s, channels, positions, width, x_b, x_f, x_c, x_h, x_w, FLAT)
    outer = _read(
        grad, batch, frame, c, s, channels, positions, width,
        grad_b, grad_f, grad_c, grad_h, grad_w, FLAT,
    )  # fmt: skip
    value -= _of_channels(mean, batch, c, channels, groups)
    value *= _of_channels(rstd, batch, c, channels, groups)
    if SILU:
        scale = tl.load(weight + c, mask=c < channels, other=0.0).to(tl.float32)[:, None]
        shift = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[:, None]
        y = value * scale + shift
        sigmoid = _sigmoid(y)
        outer *= sigmoid * (1 + y * (1 - sigmoid))
    return value, outer


@triton.jit(do_not_specialize=UNALIGNED)
def _reduce_gradient(
    x, grad, weight, bias, mean, rstd, totals, products, groups, frames, channels, positions,
    width, x_b, x_f, x_c, x_h, x_w, grad_b, grad_f, grad_c, grad_h, grad_w,
    SILU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    FLAT: tl.constexpr, BY_CHANNEL: tl.constexpr,
):  # fmt: skip
    """Sums of the gradient, and of it times the normalised values, for each channel of a tile."""
    batch, frame, c, s, chunk = _tile(
        frames, channels, positions, BLOCK_C, BLOCK_S, BY_CHANNEL, False
    )
    value, outer = _outer(
        x, grad, weight, bias, mean, rstd, groups, batch, frame, c, s, channels, positions, width,
        x_b, x_f, x_c, x_h, x_w, grad_b, grad_f, grad_c, grad_h, grad_w, SILU, FLAT,
    )  # fmt: skip
    part = ((batch * channels + c) * frames + frame) * tl.cdiv(positions, BLOCK_S) + chunk
    tl.store(totals + part, tl.sum(outer, 1), mask=c < channels)
    tl.store(products + part, tl.sum(outer * value, 1), mask=c < channels)


@triton.jit(do_not_specialize=["batches", "groups", "size", "count"])
def _merge_gradient(
    totals, products, weight, constant, slope, dweight, dbias, batches, groups, size, parts, count,
    BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One group: gradients of its weight and bias, and what every value's gradient loses."""
    group = tl.program_id(0)
    lane = tl.arange(0, BLOCK_G)
    column = tl.arange(0, BLOCK_P)[None, :]
    c = group * size + lane
    scale = tl.load(weight + c, mask=lane < size, other=0.0).to(tl.float32)
    whole = tl.zeros([BLOCK_G], tl.float32)
    whole_product = tl.zeros([BLOCK_G], tl.float32)
    row = c[:, None] * parts + column
    for b in range(batches):
        total = tl.zeros([BLOCK_G, BLOCK_P], tl.float32)
        product = tl.zeros([BLOCK_G, BLOCK_P], tl.float32)
        for start in range(0, parts, BLOCK_P):
            inside = (lane < size)[:, None] & (start + column < parts)
            total += tl.load(totals + row + start, mask=inside, other=0.0)
            product += tl.load(products + row + start, mask=inside, other=0.0)
        row += groups * size * parts
        sums = tl.sum(total, 1)
        sums_product = tl.sum(product, 1)
        tl.store(constant + b * groups + group, tl.sum(scale * sums, 0) / count)
        tl.store(slope + b * groups + group, tl.sum(scale * sums_product, 0) / count)
        whole += sums
        whole_product += sums_product
    tl.store(dbias + c, whole.to(dbias.dtype.element_ty), mask=lane < size)
    tl.store(dweight + c, whole_product.to(dweight.dtype.element_ty), mask=lane < size)


@triton.jit(do_not_specialize=UNALIGNED)
def _differentiate(
    x, grad, dx, weight, bias, mean, rstd, constant, slope, groups, frames, channels, positions,
    width, x_b, x_f, x_c, x_h, x_w, grad_b, grad_f, grad_c, grad_h, grad_w,
    dx_b, dx_f, dx_c, dx_h, dx_w,
    SILU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    FLAT: tl.constexpr, BY_CHANNEL: tl.constexpr,
):  # fmt: skip
    """dx of a tile."""
    batch, frame, c, s, _ = _tile(frames, channels, positions, BLOCK_C, BLOCK_S, BY_CHANNEL, True)
    value, outer = _outer(
        x, grad, weight, bias, mean, rstd, groups, batch, frame, c, s, channels, positions, width,
        x_b, x_f, x_c, x_h, x_w, grad_b, grad_f, grad_c, grad_h, grad_w, SILU, FLAT,
    )  # fmt: skip
    scale = tl.load(weight + c, mask=c < channels, other=0.0).to(tl.float32)[:, None]
    lost = _of_channels(constant, batch, c, channels, groups)
    lost += value * _of_channels(slope, batch, c, channels, groups)
    found = (outer * scale - lost) * _of_channels(rstd, batch, c, channels, groups)
    _write(
        dx, found, batch, frame, c, s, channels, positions, width, dx_b, dx_f, dx_c, dx_h, dx_w,
        FLAT,
    )  # fmt: skip
