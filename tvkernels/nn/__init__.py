"""Modules with weights, over the ops."""

from tvkernels.nn.norm import ClipGroupNorm, InstanceCentering
from tvkernels.nn.spectral import SpectralLinear
from tvkernels.nn.temporal import ShiftRestrictedTemporalAttention, TemporalAttention
from tvkernels.nn.temporal_unet import TemporalUNet

__all__ = [
    "ClipGroupNorm",
    "InstanceCentering",
    "ShiftRestrictedTemporalAttention",
    "SpectralLinear",
    "TemporalAttention",
    "TemporalUNet",
]
