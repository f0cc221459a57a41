"""Fused attention ops, diffusers processors and lean editing pipelines for SD-1.x video."""

import importlib
from typing import TYPE_CHECKING

from tvkernels._dispatch import BackendError
from tvkernels.ops.clip_group_norm.api import clip_group_norm
from tvkernels.ops.frame_attention.api import frame_attention
from tvkernels.ops.guided_ddim_step.api import ddim_inversion_step, guided_ddim_step
from tvkernels.ops.instance_center.api import instance_center
from tvkernels.ops.latent_blend.api import latent_blend
from tvkernels.ops.power_iteration.api import power_iteration
from tvkernels.ops.shift_restricted_temporal_attention.api import (
    shift_restricted_temporal_attention,
)
from tvkernels.ops.spectral_linear.api import spectral_linear, spectral_sigma
from tvkernels.ops.temporal_attention.api import temporal_attention
from tvkernels.ops.temporal_conv.api import temporal_conv
from tvkernels.ops.token_map_attention.api import token_map_attention
from tvkernels.patterns import FramePattern, FrameTable

if TYPE_CHECKING:
    from tvkernels import recipes
    from tvkernels._inflate import inflate
    from tvkernels.ops.atlas_composite.api import atlas_composite
    from tvkernels.ops.atlas_sample.api import atlas_sample
    from tvkernels.ops.atlas_splat.api import atlas_splat
    from tvkernels.processors import Handle, install
    from tvkernels.published import load_published

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "FramePattern",
    "FrameTable",
    "Handle",
    "atlas_composite",
    "atlas_sample",
    "atlas_splat",
    "clip_group_norm",
    "ddim_inversion_step",
    "frame_attention",
    "guided_ddim_step",
    "inflate",
    "install",
    "instance_center",
    "latent_blend",
    "load_published",
    "power_iteration",
    "recipes",
    "shift_restricted_temporal_attention",
    "spectral_linear",
    "spectral_sigma",
    "temporal_attention",
    "temporal_conv",
    "token_map_attention",
]

# A UNet's ops are registered at import, for programs that hold them; the atlas's, and what is
# built on ops, are imported when they are first named.
_LATER = {
    "atlas_composite": "tvkernels.ops.atlas_composite.api",
    "atlas_sample": "tvkernels.ops.atlas_sample.api",
    "atlas_splat": "tvkernels.ops.atlas_splat.api",
    "Handle": "tvkernels.processors",
    "inflate": "tvkernels._inflate",
    "install": "tvkernels.processors",
    "load_published": "tvkernels.published",
}


def __getattr__(name: str):
    if name == "recipes":
        return importlib.import_module("tvkernels.recipes")
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LATER[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
