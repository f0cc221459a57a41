"""One pass over the points: all layers of a point in one program, forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tvkernels._triton import support
from tvkernels.ops.atlas_sample.kernels import over_points, strides

UNALIGNED = ("points", "channels", "count")


def why_not(layers, alpha) -> list[str]:
    """Reasons against this call."""
    return support.why_not(layers, alpha)


def forward(layers, alpha):
    """Shapes as in `tvkernels.atlas_composite`."""
    b, count, p, c = layers.shape
    out = torch.empty((b, p, c), dtype=layers.dtype, device=layers.device)
    if out.numel():
        over_points(
            "atlas_composite", _composite, p, b, layers,
            {"layers": layers, "alpha": alpha, "out": out, "channels": c, "count": count}
            | strides(layers=layers, alpha=alpha),
        )  # fmt: skip
    return out


def backward(grads, layers, alpha):
    """Exact gradients; what lies behind a layer is made again, for layers are few."""
    b, count, p, c = layers.shape
    if not layers.numel():
        return [torch.zeros_like(layers), torch.zeros_like(alpha)]
    dlayers = torch.empty((b, count, p, c), dtype=layers.dtype, device=layers.device)
    dalpha = torch.empty((b, count - 1, p), dtype=layers.dtype, device=layers.device)
    grad = grads[0]
    over_points(
        "atlas_composite", _differentiate, p, b, layers,
        {
            "layers": layers, "alpha": alpha, "grad": grad, "dlayers": dlayers, "dalpha": dalpha,
            "channels": c, "count": count,
        } | strides(layers=layers, alpha=alpha, grad=grad),
    )  # fmt: skip
    return [dlayers, dalpha]


@triton.jit
def _behind(
    start, opacity, inside, here, first, count, layers_1, alpha_1,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What the layers from number `first` on show together, [points, channels]."""
    shown = tl.load(start + (count - 1) * layers_1, mask=inside, other=0.0).to(tl.float32)
    for j in range(0, count - 1 - first):
        i = count - 2 - j
        a = tl.load(opacity + i * alpha_1, mask=here, other=0.0).to(tl.float32)[:, None]
        own = tl.load(start + i * layers_1, mask=inside, other=0.0).to(tl.float32)
        shown = shown + a * (own - shown)
    return shown


@triton.jit(do_not_specialize=UNALIGNED)
def _composite(
    layers, alpha, out, points, channels, count, layers_0, layers_1, layers_2, layers_3,
    alpha_0, alpha_1, alpha_2, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A block of points, some channels at a time, from the back to the front."""
    blocks = tl.cdiv(points, BLOCK)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    p = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = p < points
    layer_step = layers_1 + tl.zeros([1, 1], tl.int64)
    alpha_step = alpha_1 + tl.zeros([1], tl.int64)
    opacity = alpha + batch * alpha_0 + p * alpha_2
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)[None, :]
        inside = here[:, None] & (c < channels)
        start = layers + batch * layers_0 + p[:, None] * layers_2 + c.to(tl.int64) * layers_3
        shown = _behind(
            start, opacity, inside, here, 0, count, layer_step, alpha_step, BLOCK, BLOCK_C
        )
        at = out + (batch * points + p)[:, None] * channels + c
        tl.store(at, shown.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=UNALIGNED)
def _differentiate(
    layers, alpha, grad, dlayers, dalpha, points, channels, count,
    layers_0, layers_1, layers_2, layers_3, alpha_0, alpha_1, alpha_2, grad_0, grad_1, grad_2,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of points, from the front to the back."""
    blocks = tl.cdiv(points, BLOCK)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    p = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = p < points
    layer_step = layers_1 + tl.zeros([1, 1], tl.int64)
    alpha_step = alpha_1 + tl.zeros([1], tl.int64)
    opacity = alpha + batch * alpha_0 + p * alpha_2
    through = tl.full([BLOCK], 1.0, tl.float32)
    for i in range(0, count):
        a = tl.full([BLOCK], 1.0, tl.float32)
        if i < count - 1:
            a = tl.load(opacity + i * alpha_step, mask=here, other=0.0).to(tl.float32)
        step = tl.zeros([BLOCK], tl.float32)
        for first in range(0, channels, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)[None, :]
            inside = here[:, None] & (c < channels)
            at = grad + batch * grad_0 + p[:, None] * grad_1 + c.to(tl.int64) * grad_2
            outer = tl.load(at, mask=inside, other=0.0).to(tl.float32) * through[:, None]
            at = dlayers + ((batch * count + i) * points + p)[:, None] * channels + c
            tl.store(at, (outer * a[:, None]).to(dlayers.dtype.element_ty), mask=inside)
            start = layers + batch * layers_0 + p[:, None] * layers_2 + c.to(tl.int64) * layers_3
            if i < count - 1:
                shown = _behind(
                    start, opacity, inside, here, i + 1, count, layer_step, alpha_step,
                    BLOCK, BLOCK_C,
                )  # fmt: skip
                own = tl.load(start + i * layer_step, mask=inside, other=0.0).to(tl.float32)
                step += tl.sum(outer * (own - shown), 1)
        if i < count - 1:
            at = dalpha + (batch * (count - 1) + i) * points + p
            tl.store(at, step.to(dalpha.dtype.element_ty), mask=here)
        through *= 1 - a
