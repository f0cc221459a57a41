"""STAM in two kernels at 16 bits and narrow layers; elsewhere its parts around two products.

One kernel for all of it is CUDA C++, `cuda.py`. In Triton the [rows, C] sum of the output
projection beside the projections of a head takes more registers than a thread has at 128 rows in
four warps, and fewer rows read the 0.8 MB of weights more often than the second level of cache
delivers them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from tvkernels._dispatch import OPS
from tvkernels._triton import support
from tvkernels._triton.configs import cdiv, choose, next_power_of_2
from tvkernels._triton.launch import arch, launch
from tvkernels.ops.spectral_linear.reference import normalised

NAME = "shift_restricted_temporal_attention"
WIDEST = 320  # channels of the two kernels: beyond, weights outgrow what programs can re-read
ONE_PASS = 32  # frames that one program holds at once
WIDEST_HEAD = 48  # its weights are held in stages: at 64 registers spill, at 160 nothing fits
NARROWEST = 16  # smallest side of a matrix product
WGMMA = ("_attend_projected", "_project_out")


def why_not(z, w_q, w_k, w_v, w_out, bias, *args) -> list[str]:
    """Reasons against this call."""
    return support.why_not(z, w_q, w_k, w_v, w_out, bias, matrices=True)


def forward(z, w_q, w_k, w_v, w_out, bias, sigma_v, sigma_out, heads):
    """Shapes as in `tvkernels.shift_restricted_temporal_attention`."""
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    if not z.numel():
        return out
    fused = z.dtype != torch.float32 and z.shape[1] <= ONE_PASS and z.shape[3] <= WIDEST
    fused = fused and z.shape[3] // heads <= WIDEST_HEAD
    if not fused:
        return _in_parts(z, w_q, w_k, w_v, w_out, bias, sigma_v, sigma_out, heads)
    attended = _attend(z, w_q, w_k, w_v, _sigma(w_v, sigma_v), heads)
    _project(z, attended, w_out, bias, _sigma(w_out, sigma_out), out)
    return out


def _in_parts(z, w_q, w_k, w_v, w_out, bias, sigma_v, sigma_out, heads):
    """Centering, one product for q, k and v, attention that reads it in place, the last product.

    float32 is centered first too: after a projection, the rounding of a large mean stays.
    """
    centered = OPS["instance_center"].backend("triton").forward(z)
    weight = torch.cat((w_q, w_k, normalised(w_v, sigma_v)))
    q, k, v = F.linear(centered, weight).unflatten(-1, (3, heads, -1)).unbind(-3)
    del centered
    attended = OPS["temporal_attention"].backend("triton").forward(q, k, v, None).flatten(3)
    return F.linear(attended, normalised(w_out, sigma_out), bias).add_(z)


def _sigma(weight, sigma):
    """The largest singular value as one number on the device."""
    return torch.linalg.svdvals(weight.float())[0] if sigma is None else sigma


def _facts(z):
    return {"arch": arch(z), "dtype": str(z.dtype)[6:]}


def _strides(name, x, axes):
    return {f"{name}_{axis}": n for axis, n in zip(axes, x.stride(), strict=True)}


def _attend(z, w_q, w_k, w_v, sigma, heads):
    """Attention of the centered z before its output projection: [B, F, N, C], contiguous."""
    b, f, n, c = z.shape
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    d = c // heads
    frames = NARROWEST if f <= NARROWEST else ONE_PASS
    config = choose(NAME, "_attend_projected", **_facts(z), frames=frames)
    head = max(NARROWEST, 1 << d.bit_length() - 1)
    numbers = {"frames": f, "positions": n, "channels": c, "heads": heads, "scale": d**-0.5}
    strides = _strides("z", z, "bfnc") | _strides("q", w_q, "oi")
    strides |= _strides("k", w_k, "oi") | _strides("v", w_v, "oi")
    launch(
        _attend_projected,
        (cdiv(n, config["POSITIONS"]) * b * heads,),
        {"z": z, "w_q": w_q, "w_k": w_k, "w_v": w_v, "sigma": sigma, "out": out}
        | numbers | strides,
        config,
        FRAMES=frames,
        HEAD_DIM=d,
        HEAD=head,
        TAIL=max(NARROWEST, next_power_of_2(d - head)) if d > head else 0,
    )  # fmt: skip
    return out


def _project(z, attended, w_out, bias, sigma, out):
    """Writes z + attended W_out^T / sigma + bias."""
    b, f, n, c = z.shape
    config = choose(NAME, "_project_out", **_facts(z))
    blocks = cdiv(b * f * n, config["ROWS"]) * cdiv(c, config["COLUMNS"])
    launch(
        _project_out,
        (blocks,),
        {"z": z, "attended": attended, "weight": w_out, "sigma": sigma, "out": out}
        | {"bias": None if bias is None else bias.contiguous()}
        | {"frames": f, "positions": n, "channels": c, "rows": b * f * n}
        | _strides("z", z, "bfnc") | _strides("weight", w_out, "oi"),
        config,
    )  # fmt: skip


@triton.jit(do_not_specialize=["frames"])
def _attend_projected(
    z, w_q, w_k, w_v, sigma, out, frames, positions, channels, heads, scale,
    z_b, z_f, z_n, z_c, q_o, q_i, k_o, k_i, v_o, v_i,
    POSITIONS: tl.constexpr, FRAMES: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One head of a block of positions: projections of z, centered after, and attention.

    Centering commutes with a projection without bias. z is not rounded again before its product
    and that is centered in float32, so that a large mean costs no digit.
    """
    # All heads of one block of positions follow each other: its z stays in cache.
    head = tl.program_id(0) % heads
    blocks = tl.cdiv(positions, POSITIONS)
    batch = (tl.program_id(0) // heads // blocks).to(tl.int64)
    row = tl.arange(0, POSITIONS * FRAMES)
    frame = row % FRAMES
    position = (tl.program_id(0) // heads % blocks) * POSITIONS + row // FRAMES
    inside = ((frame < frames) & (position < positions))[:, None]
    z += batch * z_b
    z_at = (frame.to(tl.int64) * z_f + position.to(tl.int64) * z_n)[:, None]
    first = head * HEAD_DIM
    q0 = tl.zeros([POSITIONS * FRAMES, HEAD], tl.float32)
    k0 = tl.zeros([POSITIONS * FRAMES, HEAD], tl.float32)
    v0 = tl.zeros([POSITIONS * FRAMES, HEAD], tl.float32)
    if TAIL:
        q1 = tl.zeros([POSITIONS * FRAMES, TAIL], tl.float32)
        k1 = tl.zeros([POSITIONS * FRAMES, TAIL], tl.float32)
        v1 = tl.zeros([POSITIONS * FRAMES, TAIL], tl.float32)
    for start in range(0, channels, CHUNK):
        column = start + tl.arange(0, CHUNK)
        known = column < channels
        x = tl.load(z + z_at + column[None, :] * z_c, mask=inside & known[None, :], other=0.0)
        q0 = tl.dot(x, _weights(w_q, first, column, known, q_o, q_i, 0, HEAD_DIM, HEAD), q0)
        k0 = tl.dot(x, _weights(w_k, first, column, known, k_o, k_i, 0, HEAD_DIM, HEAD), k0)
        v0 = tl.dot(x, _weights(w_v, first, column, known, v_o, v_i, 0, HEAD_DIM, HEAD), v0)
        if TAIL:
            q1 = tl.dot(x, _weights(w_q, first, column, known, q_o, q_i, HEAD, HEAD_DIM, TAIL), q1)
            k1 = tl.dot(x, _weights(w_k, first, column, known, k_o, k_i, HEAD, HEAD_DIM, TAIL), k1)
            v1 = tl.dot(x, _weights(w_v, first, column, known, v_o, v_i, HEAD, HEAD_DIM, TAIL), v1)
    kind: tl.constexpr = out.dtype.element_ty
    q0 = _centered(q0, frames, POSITIONS, FRAMES, HEAD).to(kind)
    k0 = _centered(k0, frames, POSITIONS, FRAMES, HEAD).to(kind)
    scores = tl.dot(q0, k0.permute(0, 2, 1), out_dtype=tl.float32)
    if TAIL:
        q1 = _centered(q1, frames, POSITIONS, FRAMES, TAIL).to(kind)
        k1 = _centered(k1, frames, POSITIONS, FRAMES, TAIL).to(kind)
        scores += tl.dot(q1, k1.permute(0, 2, 1), out_dtype=tl.float32)
    known = (tl.arange(0, FRAMES) < frames)[None, None, :]
    scores = tl.where(known, scores * (scale * 1.4426950408889634), float("-inf"))
    shares = tl.math.exp2(scores - tl.max(scores, 2)[:, :, None])
    shares = (shares * (1.0 / tl.sum(shares, 2))[:, :, None]).to(kind)
    norm = _inverse(sigma)
    out += batch * frames * positions * channels
    out_at = ((frame.to(tl.int64) * positions + position) * channels + first)[:, None]
    v0 = _centered(v0 * norm, frames, POSITIONS, FRAMES, HEAD).to(kind)
    v0 = tl.dot(shares, v0, out_dtype=tl.float32).reshape(POSITIONS * FRAMES, HEAD)
    column = tl.arange(0, HEAD)[None, :]
    tl.store(out + out_at + column, v0.to(kind), mask=inside & (column < HEAD_DIM))
    if TAIL:
        v1 = _centered(v1 * norm, frames, POSITIONS, FRAMES, TAIL).to(kind)
        v1 = tl.dot(shares, v1, out_dtype=tl.float32).reshape(POSITIONS * FRAMES, TAIL)
        column = HEAD + tl.arange(0, TAIL)[None, :]
        tl.store(out + out_at + column, v1.to(kind), mask=inside & (column < HEAD_DIM))


@triton.jit
def _weights(
    w, first, column, known, w_o, w_i,
    START: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows of a head's weight as columns: [channels, WIDTH]."""
    row = START + tl.arange(0, WIDTH)
    at = (first + row)[:, None] * w_o + column[None, :] * w_i
    mask = (row < HEAD_DIM)[:, None] & known[None, :]
    return tl.load(w + at, mask=mask, other=0.0).trans(1, 0)


@triton.jit
def _centered(x, frames, POSITIONS: tl.constexpr, FRAMES: tl.constexpr, WIDTH: tl.constexpr):
    """[positions x frames, WIDTH] minus the mean over frames, apart: frames beyond are zero."""
    x = x.reshape(POSITIONS, FRAMES, WIDTH)
    return x - (tl.sum(x, 1) / frames)[:, None, :]


@triton.jit
def _inverse(sigma):
    """1 / sigma, and 0 where sigma is 0."""
    sigma = tl.load(sigma).to(tl.float32)
    return tl.where(sigma > 0, 1.0 / tl.where(sigma > 0, sigma, 1.0), 0.0)


@triton.jit(do_not_specialize=["frames"])
def _project_out(
    z, attended, weight, bias, sigma, out, frames, positions, channels, rows,
    z_b, z_f, z_n, z_c, weight_o, weight_i,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A tile of z + attended W^T / sigma + bias; tiles of the same rows follow each other."""
    blocks = tl.cdiv(channels, COLUMNS)
    row = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    exists, known = row < rows, column < channels
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, channels, CHUNK):
        inner = start + tl.arange(0, CHUNK)
        real = inner < channels
        at = row.to(tl.int64)[:, None] * channels + inner[None, :]
        x = tl.load(attended + at, mask=exists[:, None] & real[None, :], other=0.0)
        at = column[:, None] * weight_o + inner[None, :] * weight_i
        w = tl.load(weight + at, mask=known[:, None] & real[None, :], other=0.0)
        total = tl.dot(x, w.trans(1, 0), total)
    total *= _inverse(sigma)
    if bias is not None:
        total += tl.load(bias + column, mask=known, other=0.0).to(tl.float32)[None, :]
    inside = exists[:, None] & known[None, :]
    clip, place = row // (frames * positions), row % (frames * positions)
    at = clip.to(tl.int64) * z_b + (place // positions).to(tl.int64) * z_f
    at += (place % positions).to(tl.int64) * z_n
    total += tl.load(z + at[:, None] + column[None, :] * z_c, mask=inside, other=0.0)
    at = row.to(tl.int64)[:, None] * channels + column[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
