"""One edit of a scene of the shapes world, timed and measured against the exact truth."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tvkernels.demo.metrics import background_psnr, target_accuracy, temporal_error
from tvkernels.demo.world import Scene
from tvkernels.edit import fetch_bytes

if TYPE_CHECKING:
    from tvkernels.pipelines.one_shot import OneShotPipeline, Settings


@dataclass(frozen=True)
class Edited:
    """An edit and what it was worth.

    Attributes:
        frames: uint8 [F, H, W, 3].
        measures: accuracy, color, shape (shares of frames), psnr (dB), temporal, object,
            background (temporal errors, [0, 1]), preprocess_s, edit_s, peak_mib; None where
            there is nothing to measure.
    """

    frames: np.ndarray
    measures: dict[str, float | None]


def edit_scene(
    pipe: OneShotPipeline,
    numbers: Settings,
    source: Scene,
    target: Scene,
    frames: np.ndarray | None = None,
    seed: int = 0,
) -> Edited:
    """Tunes on a scene, inverts it, edits it into another and measures; no cache is used.

    Args:
        pipe: of the method.
        numbers: tune_steps, learning_rate, steps and guidance; the rest is the pipeline's own.
        source, target: the scene and its edit.
        frames: the source as read from a file, uint8 [F, H, W, 3]; None renders it.
        seed: of everything drawn.
    """
    clip, truth = source.render(), target.render()
    frames = clip.frames if frames is None else frames
    memory = PeakMemory(pipe.device)
    began = time.perf_counter()
    pipe.set_progress_bar_config(leave=False, disable=None, desc="tuning")
    pipe.fit(
        frames, source.caption, num_steps=numbers.tune_steps, learning_rate=numbers.learning_rate,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    pipe.set_progress_bar_config(leave=False, disable=None, desc="inversion")
    pipe.invert(frames, num_inference_steps=numbers.steps)
    prepared = time.perf_counter()
    pipe.set_progress_bar_config(leave=False, disable=None, desc="sampling")
    pixels = pipe(
        target.caption, num_inference_steps=numbers.steps, guidance_scale=numbers.guidance,
        output_type="pt",
    ).frames[0]  # fmt: skip
    edited = fetch_bytes(pixels)()
    done = time.perf_counter()
    accuracy = target_accuracy(edited, target)
    temporal: dict[str, Any] = {"all": None, "object": None, "background": None}
    if len(edited) > 1:
        temporal = temporal_error(edited, target)
    measures = {
        "accuracy": accuracy["both"],
        "color": accuracy["color"],
        "shape": accuracy["shape"],
        "psnr": background_psnr(edited, clip, truth),
        "temporal": temporal["all"],
        "object": temporal["object"],
        "background": temporal["background"],
        "preprocess_s": prepared - began,
        "edit_s": done - prepared,
        "peak_mib": memory.peak_mib(),
    }
    return Edited(edited, measures)


class PeakMemory:
    """Peak memory from construction on.

    On CUDA what PyTorch's allocator held; on a CPU the resident set of the whole process,
    interpreter and libraries included, whose mark Linux sets back through /proc/self/clear_refs.
    Where that cannot be done the peak is None: not measured.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.fresh = True
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.fresh = False

    def peak_mib(self) -> float | None:
        """MiB, or None."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        if not self.fresh:
            return None
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**10
