"""Norm and SiLU in one pass over x, then the convolution as a product of tiles for each tap.

A program of the product takes output channels and positions of one output frame, and of the taps
only those that meet a frame; which frame, nearest resize and stride included, is an address. What
the norm makes is held once in x's dtype: normalised while it is read, each value would cost two
numbers of its position's statistics and an exponential for every tap and tile of output channels
(30 times at 1,280 channels). The gradient is `cpu.py`'s, composed of torch's own products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tvkernels._triton import support
from tvkernels._triton.configs import cdiv, choose
from tvkernels._triton.launch import arch, launch

NORM_SIZES = ("frames", "groups", "size", "positions", "width")
SIZES = ("frames", "real", "count", "stride", "width")


def why_not(
    x, weight, bias, norm_weight, norm_bias, residual, groups, eps, stride, frames
) -> list[str]:
    """Reasons against this call."""
    tensors = (x, weight, bias, norm_weight, norm_bias, residual)
    reasons = support.why_not(*tensors, matrices=True)
    if sum((n - 1) * s for n, s in zip(x.shape[2:], x.stride()[2:], strict=True)) >= 2**31:
        reasons.append("a frame of x spans 2**31 elements or more")
    return reasons


def forward(x, weight, bias, norm_weight, norm_bias, residual, groups, eps, stride, frames):
    """Shapes as in `tvkernels.temporal_conv`."""
    b, f, c, h, w = x.shape
    outs, _, kernel = weight.shape
    count = (frames - 1) // stride + 1
    out = torch.empty((b, count, outs, h, w), dtype=x.dtype, device=x.device)
    if not out.numel() or not x.numel():
        return out.zero_()
    if norm_weight is not None:
        x = _activate(x, norm_weight, norm_bias, groups, eps)
    taps = _turn(weight)
    config = choose("temporal_conv", "_convolve", arch=arch(x), dtype=_dtype(x), channels=c)
    tiles = cdiv(outs, config["BLOCK_O"]) * cdiv(h * w, config["BLOCK_S"])
    launch(
        _convolve,
        (b * count * tiles,),
        {
            "x": x, "weight": taps, "residual": residual, "out": out,
            "bias": None if bias is None else bias.contiguous(),
            "channels": c, "outs": outs, "frames": frames, "real": f, "count": count,
            "stride": stride, "positions": h * w, "width": w,
            **_strides("x", x), **_strides("r", out if residual is None else residual),
        },
        config,
        KERNEL=kernel,
        FLAT=_flat(x) and (residual is None or _flat(residual)),
        WHOLE=not (c % config["BLOCK_C"] or outs % config["BLOCK_O"] or h * w % config["BLOCK_S"]),
    )  # fmt: skip
    return out


def _turn(weight: Tensor) -> Tensor:
    """[O, C, K] as [K, O, C], a tap's matrix in whole lines: 10 MB are moved at 1,280 channels."""
    outs, channels, kernel = weight.shape
    taps = torch.empty((kernel, outs, channels), dtype=weight.dtype, device=weight.device)
    config = choose("temporal_conv", "_turn_taps", arch=arch(weight))
    strides = dict(zip(("w_o", "w_c", "w_k"), weight.stride(), strict=True))
    launch(
        _turn_taps,
        (cdiv(outs * channels, config["BLOCK"]),),
        {"weight": weight, "taps": taps, "channels": channels, "size": outs * channels, **strides},
        config,
        KERNEL=kernel,
    )
    return taps


def _activate(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    b, f, c, h, w = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    config = choose("temporal_conv", "_activate_groups", arch=arch(x))
    launch(
        _activate_groups,
        (b * groups * cdiv(h * w, config["BLOCK_S"]),),
        {
            "x": x, "out": out, "weight": weight.contiguous(), "bias": bias.contiguous(),
            "frames": f, "groups": groups, "size": c // groups, "positions": h * w, "width": w,
            "eps": float(eps), **_strides("x", x),
        },
        config,
        FLAT=_flat(x),
    )  # fmt: skip
    return out


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_{axis}": s for axis, s in zip("bfchw", x.stride(), strict=True)}


def _flat(x: Tensor) -> bool:
    """Whether positions follow each other at one distance."""
    return x.shape[3] == 1 or x.stride(3) == x.shape[4] * x.stride(4)


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


@triton.jit
def _places(s, width, x_h, x_w, FLAT: tl.constexpr):
    """Distances of positions from the first one."""
    if FLAT:
        place = s.to(tl.int64) * x_w
    else:
        place = (s // width).to(tl.int64) * x_h + (s % width).to(tl.int64) * x_w
    return place


@triton.jit(do_not_specialize=["channels", "size"])
def _turn_taps(
    weight, taps, channels, size, w_o, w_c, w_k, KERNEL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Some of each tap's matrix."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = weight + (i // channels).to(tl.int64) * w_o + (i % channels).to(tl.int64) * w_c
    for k in tl.static_range(KERNEL):
        value = tl.load(at + k * w_k, mask=i < size, other=0.0)
        tl.store(taps + k * size.to(tl.int64) + i, value, mask=i < size)


@triton.jit(do_not_specialize=NORM_SIZES)
def _activate_groups(
    x, out, weight, bias, frames, groups, size, positions, width, eps, x_b, x_f, x_c, x_h, x_w,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """One group at some positions, all its frames: statistics in two passes, then norm and SiLU.

    The second and the third pass find what the first one read in cache.
    """
    i = tl.program_id(0)
    chunks = tl.cdiv(positions, BLOCK_S)
    s = i % chunks * BLOCK_S + tl.arange(0, BLOCK_S)
    group = i // chunks % groups
    batch = (i // (chunks * groups)).to(tl.int64)
    lane = tl.arange(0, BLOCK_C)
    first = group * size
    base = x + batch * x_b + first.to(tl.int64) * x_c + _places(s, width, x_h, x_w, FLAT)[None, :]
    live = (s < positions)[None, :]
    steps = tl.cdiv(size, BLOCK_C)
    number = (frames * size).to(tl.float32)
    total = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    for step in range(frames * steps):
        c = step % steps * BLOCK_C + lane
        at = base + (step // steps).to(tl.int64) * x_f + c.to(tl.int64)[:, None] * x_c
        total += tl.load(at, mask=(c < size)[:, None] & live, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / number
    total = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    for step in range(frames * steps):
        c = step % steps * BLOCK_C + lane
        at = base + (step // steps).to(tl.int64) * x_f + c.to(tl.int64)[:, None] * x_c
        inside = (c < size)[:, None] & live
        centred = tl.load(at, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        total += tl.where(inside, centred * centred, 0.0)
    rstd = 1 / tl.sqrt_rn(tl.sum(total, 0) / number + eps)
    channels = groups * size
    for step in range(frames * steps):
        c = step % steps * BLOCK_C + lane
        frame = step // steps
        at = base + frame.to(tl.int64) * x_f + c.to(tl.int64)[:, None] * x_c
        inside = (c < size)[:, None] & live
        y = (tl.load(at, mask=inside, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
        scale = tl.load(weight + first + c, mask=c < size, other=0.0).to(tl.float32)
        shift = tl.load(bias + first + c, mask=c < size, other=0.0).to(tl.float32)
        y = y * scale[:, None] + shift[:, None]
        y = y / (1 + tl.math.exp2(-1.4426950408889634 * y))
        row = ((batch * frames + frame) * channels + first + c).to(tl.int64)
        place = row[:, None] * positions + s[None, :]
        tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _convolve(
    x, weight, bias, residual, out, channels, outs, frames, real, count, stride, positions, width,
    x_b, x_f, x_c, x_h, x_w, r_b, r_f, r_c, r_h, r_w,
    KERNEL: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    FLAT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A tile [output channels, positions] of one output frame."""
    i = tl.program_id(0)
    blocks = tl.cdiv(outs, BLOCK_O)
    chunks = tl.cdiv(positions, BLOCK_S)
    o = i % blocks * BLOCK_O + tl.arange(0, BLOCK_O)  # neighbours share the positions they read
    s = i // blocks % chunks * BLOCK_S + tl.arange(0, BLOCK_S)
    image = i // (blocks * chunks)
    frame = image % count
    batch = (image // count).to(tl.int64)
    start = frame * stride - KERNEL // 2
    lane = tl.arange(0, BLOCK_C)
    # Distances in 32 bits: whole tiles of pointers took 255 registers, and spilled.
    if FLAT:
        place = s * x_w
    else:
        place = s // width * x_h + s % width * x_w
    read = lane[:, None] * x_c + place[None, :]
    matrix = o[:, None] * channels + lane[None, :]
    total = tl.zeros([BLOCK_O, BLOCK_S], tl.float32)
    for k in range(tl.maximum(0, -start), tl.minimum(KERNEL, frames - start)):
        source = x + batch * x_b + ((start + k) * real // frames).to(tl.int64) * x_f
        taps = weight + k * outs * channels
        for c in range(0, channels, BLOCK_C):
            if WHOLE:
                values = tl.load(source + c * x_c + read)
                factors = tl.load(taps + c + matrix)
            else:
                more = lane < channels - c
                inside = more[:, None] & (s < positions)[None, :]
                values = tl.load(source + c * x_c + read, mask=inside, other=0.0)
                inside = (o < outs)[:, None] & more[None, :]
                factors = tl.load(taps + c + matrix, mask=inside, other=0.0)
            total = tl.dot(factors, values, total, input_precision="ieee")
    inside = (o < outs)[:, None] & (s < positions)[None, :]
    if bias is not None:
        total += tl.load(bias + o, mask=o < outs, other=0.0).to(tl.float32)[:, None]
    if residual is not None:
        at = residual + batch * r_b + frame.to(tl.int64) * r_f + o.to(tl.int64)[:, None] * r_c
        at = at + _places(s, width, r_h, r_w, FLAT)[None, :]
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    row = (image.to(tl.int64) * outs + o)[:, None] * positions
    tl.store(out + row + s[None, :], total.to(out.dtype.element_ty), mask=inside)
