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
    from tvkernels.pipelines.cache import Cache
    from tvkernels.pipelines.one_shot import OneShotPipeline, Settings


@dataclass(frozen=True)
class Edited:
    """An edit and what it was worth.

    Attributes:
        frames: uint8 [F, H, W, 3].
        measures: accuracy, color, shape (shares of frames), psnr (dB), temporal, object,
            background (temporal errors, [0, 1]), iou (of an automatic mask, see `mask_iou`),
            preprocess_s, edit_s, peak_mib; None where there is nothing to measure.
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
    masked: str | None = None,
    cache: Cache | None = None,
) -> Edited:
    """Tunes on a scene, inverts it, edits it into another and measures.

    Args:
        pipe: of the method.
        numbers: tune_steps, learning_rate, steps and guidance; the rest is the pipeline's own.
        source, target: the scene and its edit.
        frames: the source as read from a file, uint8 [F, H, W, 3]; None renders it.
        seed: of everything drawn.
        masked: for methods that edit a region, whether it is told by "words", the captions' names
            of the object, or by the "true" masks; None for methods that take neither.
        cache: of what `fit` makes; with one, preprocess_s is not measured.
    """
    clip, truth = source.render(), target.render()
    frames = clip.frames if frames is None else frames
    memory = PeakMemory(pipe.device)
    began = time.perf_counter()
    pipe.set_progress_bar_config(leave=False, disable=None, desc="tuning")
    pipe.fit(
        frames, source.caption, num_steps=numbers.tune_steps, learning_rate=numbers.learning_rate,
        generator=torch.Generator().manual_seed(seed), cache=cache,
    )  # fmt: skip
    pipe.set_progress_bar_config(leave=False, disable=None, desc="inversion")
    pipe.invert(frames, num_inference_steps=numbers.steps)
    told: dict[str, Any] = {}
    if masked is not None:
        told["generator"] = torch.Generator().manual_seed(seed)
        things = source.objects[0], target.objects[0]
        names = tuple(f"{thing.color} {thing.shape}" for thing in things)
        true = np.maximum(clip.masks, truth.masks) > 0
        told |= {"words": [names]} if masked == "words" else {"mask": true}
    prepared = time.perf_counter()
    pipe.set_progress_bar_config(leave=False, disable=None, desc="sampling")
    pixels = pipe(
        target.caption, num_inference_steps=numbers.steps, guidance_scale=numbers.guidance,
        output_type="pt", **told,
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
        "iou": mask_iou(pipe.mask, true) if masked == "words" else None,
        "preprocess_s": prepared - began if cache is None else None,
        "edit_s": done - prepared,
        "peak_mib": memory.peak_mib(),
    }
    return Edited(edited, measures)


def mask_iou(mask: torch.Tensor, true: np.ndarray) -> float:
    """Intersection over union of an edit's last mask with the object, over all frames.

    Counted on the latents, of which any is the object's that holds a pixel of the source's or the
    target's true mask: what an edit must cover, and what a method makes of the true mask given.

    Args:
        mask: bool [F, h, w].
        true: bool [F, H, W], the union of both true masks.
    """
    cell = true.shape[1] // mask.shape[1]
    pixels = torch.from_numpy(true).float()[:, None]
    wanted = torch.nn.functional.max_pool2d(pixels, cell)[:, 0].to(mask.device) > 0
    return ((mask & wanted).sum() / (mask | wanted).sum()).item()


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
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        except OSError:
            self.fresh = False

    def peak_mib(self) -> float | None:
        """MiB, or None."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        if not self.fresh:
            return None
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**10
