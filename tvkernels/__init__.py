"""tvkernels: fused attention ops, diffusers processors and lean editing pipelines for SD-1.x video."""

from tvkernels._dispatch import BackendError
from tvkernels.ops.frame_attention.api import frame_attention
from tvkernels.ops.instance_center.api import instance_center
from tvkernels.ops.shift_restricted_temporal_attention.api import (
    shift_restricted_temporal_attention,
)
from tvkernels.ops.spectral_linear.api import power_iteration, spectral_linear, spectral_sigma
from tvkernels.ops.temporal_attention.api import temporal_attention
from tvkernels.patterns import FramePattern, FrameTable

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "FramePattern",
    "FrameTable",
    "frame_attention",
    "instance_center",
    "power_iteration",
    "shift_restricted_temporal_attention",
    "spectral_linear",
    "spectral_sigma",
    "temporal_attention",
]
