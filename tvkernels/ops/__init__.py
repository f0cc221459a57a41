"""The ops. To add one: a folder here and its name in `NAMES`; tests and benchmarks find it."""

from __future__ import annotations

import importlib

NAMES = (
    "frame_attention",
    "temporal_attention",
    "instance_center",
    "spectral_linear",
    "power_iteration",
    "shift_restricted_temporal_attention",
    "token_map_attention",
    "guided_ddim_step",
    "latent_blend",
    "clip_group_norm",
    "atlas_sample",
    "atlas_splat",
    "atlas_composite",
    "temporal_conv",
)


def specs() -> dict:
    """name -> `tvkernels.testing.spec.OpSpec` of every op."""
    return {n: importlib.import_module(f"tvkernels.ops.{n}.spec").SPEC for n in NAMES}
