"""One launch, in place, in the order in which the foreground lies in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tvkernels._triton import elementwise, support
from tvkernels._triton.configs import cdiv, choose
from tvkernels._triton.launch import arch, launch
from tvkernels.ops.latent_blend.cpu import overlap


def why_not(foreground, background, mask) -> list[str]:
    """Reasons against this call."""
    reasons = support.why_not(foreground, background, mask)
    if any(n > 1 and s == 0 for n, s in zip(foreground.shape, foreground.stride(), strict=True)):
        reasons.append("elements of foreground share memory: it cannot be written in place")
    for name, x in (("background", background), ("mask", mask)):
        if overlap(foreground, x):
            reasons.append(f"{name} overlaps foreground, which is written while it is read")
    return reasons + elementwise.why_not(*_walk(foreground, background, mask))


def forward(foreground, background, mask):
    """Shapes as in `tvkernels.latent_blend`."""
    shape, tensors = _walk(foreground, background, mask)
    config = choose("latent_blend", "_blend", arch=arch(foreground))
    launch(
        _blend,
        (cdiv(foreground.numel(), config["BLOCK"]),),
        tensors | {"size": foreground.numel()} | elementwise.numbers(shape, tensors),
        config,
    )
    if not foreground.is_inference():
        torch.autograd.graph.increment_version(foreground)  # what saved it before is told


def _walk(foreground, background, mask):
    """Shape and tensors with dimensions ordered as foreground's memory is."""
    order = sorted(range(foreground.dim()), key=lambda i: -foreground.stride(i))
    tensors = {
        "foreground": foreground, "background": background, "mask": mask.expand(foreground.shape),
    }  # fmt: skip
    tensors = {name: x.permute(order) for name, x in tensors.items()}
    return tensors["foreground"].shape, tensors


@triton.jit
def _blend(
    foreground, background, mask, size, n1, n2, n3, n4,
    foreground_0, foreground_1, foreground_2, foreground_3, foreground_4,
    background_0, background_1, background_2, background_3, background_4,
    mask_0, mask_1, mask_2, mask_3, mask_4, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of elements."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    at = elementwise.place(i, n1, n2, n3, n4, mask_0, mask_1, mask_2, mask_3, mask_4)
    weight = tl.load(mask + at, mask=inside).to(tl.float32)
    at = elementwise.place(
        i, n1, n2, n3, n4, background_0, background_1, background_2, background_3, background_4
    )
    start = tl.load(background + at, mask=inside).to(tl.float32)
    at = foreground + elementwise.place(
        i, n1, n2, n3, n4, foreground_0, foreground_1, foreground_2, foreground_3, foreground_4
    )
    result = elementwise.lerp(start, tl.load(at, mask=inside).to(tl.float32), weight)
    tl.store(at, result.to(foreground.dtype.element_ty), mask=inside)
