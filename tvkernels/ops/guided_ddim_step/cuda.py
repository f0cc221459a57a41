"""CUDA C++, csrc/kernels/guided_ddim_step.cuh: one launch, the step's numbers read there."""

from __future__ import annotations

from tvkernels import _device, _native

LARGEST = 2**31 - 1  # elements that an int32 counts
MOST_DIMENSIONS = 8


def why_not(sample, noise, step, mask, background) -> list[str]:
    """Every reason against this call; empty if it runs."""
    reasons = _device.refuse("guided_ddim_step", sample, noise, mask, background)
    if sample.numel() > LARGEST:
        reasons.append(f"more than {LARGEST} elements")
    if sample.dim() > MOST_DIMENSIONS:
        reasons.append(f"{sample.dim()} dimensions are more than {MOST_DIMENSIONS}")
    return reasons


def forward(sample, noise, step, mask, background):
    """Shapes as in `tvkernels.guided_ddim_step`."""
    ops = _native.load("cuda")
    return ops.guided_ddim_step(sample, noise, step, mask, background)
