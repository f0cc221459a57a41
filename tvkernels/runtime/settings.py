"""How each component is prepared, as data, each choice with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

# What PyTorch itself computes in; a file's own types are beside what writes it.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class CompileSettings:
    """Of torch.compile and AOTInductor.

    Args:
        regional: each transformer block for itself, in place of the whole UNet.
        reason: what that rests on.
        mode: torch.compile's; None is its default.
        inductor: Inductor's settings where no mode is given.
        inductor_reason: what those rest on.
    """

    regional: bool
    reason: str
    mode: str | None = None
    inductor: Mapping[str, object] = field(default_factory=dict)
    inductor_reason: str = ""


UNET = {
    "cpu": CompileSettings(
        regional=False,
        reason="a step of EI2's demo UNet, guidance in two calls, 2 cores of x86-64: 0.226 s "
        "whole, 0.269 regional, 0.266 eager; compiled in 178 s whole and 28 regional",
        # Channels last, which Inductor turns convolutions to.
        inductor={"layout_optimization": False},
        inductor_reason="a 3 x 3 convolution of 64, 96 and 320 channels has 2.0, 2.4 and 4.1 "
        "times the error of contiguous channels (beyond EI2's budget at the end of the UNet), "
        "and takes as long",
    ),
    "cuda": CompileSettings(
        regional=False, reason="as on CPUs, where the ResNets fuse too; not measured on a device"
    ),
}


def compile_settings(device: str) -> CompileSettings:
    """Those of the UNet on a kind of device."""
    return UNET.get(device, UNET["cuda"])
