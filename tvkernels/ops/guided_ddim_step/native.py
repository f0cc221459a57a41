"""C++ for CPUs, csrc/cpu/guided_ddim_step.cpp: one pass over any strides."""

from __future__ import annotations

import torch

from tvkernels import _native

MOST_DIMENSIONS = 8  # csrc/common/strided.h


def why_not(sample, noise, step, mask, background) -> list[str]:
    """Every reason against this call; empty if it runs."""
    reasons = _native.refuse("guided_ddim_step", sample, noise, background)
    if any(x is not None and x.device.type != "cpu" for x in (step, mask)):
        reasons.append("needs step and mask on the CPU")
    if sample.dim() > MOST_DIMENSIONS:
        reasons.append(f"{sample.dim()} dimensions are more than {MOST_DIMENSIONS}")
    if step.dtype != torch.float32:
        reasons.append(f"step is needed in float32, got {step.dtype}")
    if mask is not None and mask.dtype not in (sample.dtype, torch.float32, torch.bool):
        reasons.append(f"mask is needed as bool, float32 or {sample.dtype}, got {mask.dtype}")
    return reasons


def forward(sample, noise, step, mask, background):
    """Shapes as in `tvkernels.guided_ddim_step`."""
    ops = _native.load("cpu")
    return ops.guided_ddim_step(sample, noise, step, mask, background)
