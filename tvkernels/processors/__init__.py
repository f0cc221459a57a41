"""Attention processors for diffusers' UNets, and how they are put in and taken out."""

from tvkernels.processors.attention import (
    FrameAttnProcessor,
    TemporalAttnProcessor,
    TextAttnProcessor,
)
from tvkernels.processors.clip import Clip
from tvkernels.processors.install import Handle, install

__all__ = [
    "Clip",
    "FrameAttnProcessor",
    "Handle",
    "TemporalAttnProcessor",
    "TextAttnProcessor",
    "install",
]
