"""Editing methods as diffusers pipelines. To add one: a file here and its line in `METHODS`."""

from __future__ import annotations

import importlib

METHODS = {
    "ei2": "tvkernels.pipelines.ei2:EI2Pipeline",
    "tune-a-video": "tvkernels.pipelines.tune_a_video:TuneAVideoPipeline",
    "tcve": "tvkernels.pipelines.tcve:TCVEPipeline",
    "stable-video": "tvkernels.pipelines.stable_video:StableVideoPipeline",
    "frame-by-frame": "tvkernels.pipelines.frame_by_frame:FrameByFramePipeline",
    "blended-diffusion": "tvkernels.pipelines.blended_diffusion:BlendedDiffusionPipeline",
}


def pipeline_class(method: str) -> type:
    """The pipeline of a method.

    Raises:
        ValueError: unknown method; the text lists the known ones.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    module, name = METHODS[method].split(":")
    return getattr(importlib.import_module(module), name)
