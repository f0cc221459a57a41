"""How each component is prepared, as data, each choice with its reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CompileSettings:
    """Of torch.compile.

    Args:
        mode: its mode; None is its default.
        regional: each transformer block for itself, in place of the whole UNet.
        reason: what the choice rests on.
    """

    mode: str | None
    regional: bool
    reason: str


UNET = {
    "cpu": CompileSettings(None, False, "the ResNets fuse too; not measured against regional"),
    "cuda": CompileSettings(None, False, "the same; not measured, and cuda_graph captures apart"),
}


def compile_settings(device: str) -> CompileSettings:
    """Those of the UNet on a kind of device."""
    return UNET.get(device, UNET["cuda"])
