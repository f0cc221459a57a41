"""One launch: guidance, update and blend, with the step's numbers read on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tvkernels._triton import elementwise, support
from tvkernels._triton.configs import cdiv, choose
from tvkernels._triton.launch import arch, launch


def why_not(sample, noise, step, mask, background) -> list[str]:
    """Reasons against this call."""
    reasons = support.why_not(sample, noise, mask, background)
    return reasons + elementwise.why_not(sample.shape, _read(sample, noise, mask, background))


def forward(sample, noise, step, mask, background):
    """Shapes as in `tvkernels.guided_ddim_step`."""
    out = torch.empty(sample.shape, dtype=sample.dtype, device=sample.device)
    read = _read(sample, noise, mask, background)
    config = choose("guided_ddim_step", "_step", arch=arch(sample))
    guided = noise.shape != sample.shape
    launch(
        _step,
        (cdiv(out.numel(), config["BLOCK"]),),
        {"mask": None, "background": None}
        | read
        | {"out": out, "step": step, "step_s": step.stride(0), "size": out.numel()}
        | {"half": sample.shape[0] * noise.stride(0) if guided else 0}
        | {f"{name}_{i}": 0 for name in ("mask", "background") for i in range(5)}
        | elementwise.numbers(sample.shape, read),
        config,
        GUIDED=guided,
    )
    return out


def _read(sample, noise, mask, background):
    """What is read, by name, each of sample's shape: of a doubled noise the unconditional half."""
    read = {"sample": sample, "noise": noise.narrow(0, 0, sample.shape[0])}
    if mask is not None:
        read |= {"mask": mask.expand(sample.shape), "background": background}
    return read


@triton.jit
def _step(
    sample, noise, mask, background, out, step, step_s, size, half, n1, n2, n3, n4,
    sample_0, sample_1, sample_2, sample_3, sample_4, noise_0, noise_1, noise_2, noise_3, noise_4,
    mask_0, mask_1, mask_2, mask_3, mask_4,
    background_0, background_1, background_2, background_3, background_4,
    GUIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of elements of the contiguous result."""
    alpha = tl.load(step).to(tl.float32)
    target = tl.load(step + step_s).to(tl.float32)
    keep = tl.sqrt_rn(tl.div_rn(target, alpha))
    add = tl.sqrt_rn(1 - target) - keep * tl.sqrt_rn(1 - alpha)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    at = elementwise.place(i, n1, n2, n3, n4, sample_0, sample_1, sample_2, sample_3, sample_4)
    x = tl.load(sample + at, mask=inside).to(tl.float32)
    at = noise + elementwise.place(i, n1, n2, n3, n4, noise_0, noise_1, noise_2, noise_3, noise_4)
    eps = tl.load(at, mask=inside).to(tl.float32)
    if GUIDED:
        guidance = tl.load(step + 2 * step_s).to(tl.float32)
        eps += guidance * (tl.load(at + half, mask=inside).to(tl.float32) - eps)
    result = x * keep + eps * add
    if mask is not None:
        at = elementwise.place(i, n1, n2, n3, n4, mask_0, mask_1, mask_2, mask_3, mask_4)
        weight = tl.load(mask + at, mask=inside).to(tl.float32)
        at = elementwise.place(
            i, n1, n2, n3, n4, background_0, background_1, background_2, background_3, background_4
        )
        start = tl.load(background + at, mask=inside).to(tl.float32)
        result = elementwise.lerp(start, result, weight)
    tl.store(out + i, result.to(out.dtype.element_ty), mask=inside)
