"""What an edited clip is worth by the field's learned metrics: V2VBench's eight, and the papers'.

    measure(["frames-text-alignment", "motion-alignment-dis"], edited, source=clip, prompt="...")

`METRICS` says what each one is and needs. Networks are loaded on first use and shared (`Models`),
and a clip passes once through each, however many metrics ask for it. Where weights or a package
are missing, the metric is refused in one line that says what to put where: nothing stands in.

Sources: V2VBench (Sun et al., "Diffusion Model-Based Video Editing: A Survey", section 4.2, and
its code), EI2 (section 5.1), TCVE (section V-A), BLD-AC (blended latent diffusion under attention
control, section IV-C), StableVideo (section 4.3).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tvkernels.video import flow as flows
from tvkernels.video._files import need
from tvkernels.video._metric_files import MetricError
from tvkernels.video._metric_formulas import (
    consecutive_cosine,
    dover_score,
    end_point_error,
    frame_wise_accuracy,
    pairwise_cosine,
    text_cosine,
)
from tvkernels.video._metric_models import BATCH, ROLES, ImageFeatures, Models
from tvkernels.video.io import check_frames

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "METRICS",
    "ROLES",
    "Measurement",
    "Metric",
    "MetricError",
    "Models",
    "consecutive_cosine",
    "dover_score",
    "end_point_error",
    "frame_wise_accuracy",
    "measure",
    "pairwise_cosine",
    "text_cosine",
]

# ViCLIP's embedding of time is of so many frames; V2VBench takes every third of its 24.
VICLIP_FRAMES = 8


class Measurement:
    """One clip to be measured; what several metrics need of it is computed once.

    Args:
        video: the edited clip, uint8 [F, H, W, 3].
        source: the clip before the edit, of the same shape.
        prompt: what the edited clip shall show.
        source_prompt: what the source shows.
        models: the networks; keep one for many clips. None takes the published ones, on the CPU.
    Raises:
        VideoError: the frames are none.
        MetricError: source and edit differ in length or size.
    """

    def __init__(
        self,
        video: np.ndarray,
        *,
        source: np.ndarray | None = None,
        prompt: str | None = None,
        source_prompt: str | None = None,
        models: Models | None = None,
    ):
        video = _frames(video)
        source = None if source is None else _frames(source)
        if source is not None and source.shape != video.shape:
            (f, h, w, _), (of, oh, ow, _) = video.shape, source.shape
            raise MetricError(
                f"the clip has {f} frames of {w} x {h} pixels, its source {of} of {ow} x {oh}: "
                "give those of the source that were edited, at the edit's size"
            )
        self.video, self.source = video, source
        self.prompt, self.source_prompt = prompt, source_prompt
        self.models = Models() if models is None else models

    def check(self, name: str) -> None:
        """Raises MetricError if the metric is unknown or what it needs was not given."""
        if name not in METRICS:
            raise MetricError(f"unknown metric {name!r}: use one of {', '.join(METRICS)}")
        metric = METRICS[name]
        for item in metric.needs:
            if getattr(self, item) is None:
                raise MetricError(f"{name} needs {NEEDS[item]}")
        if len(self.video) < metric.frames:
            raise MetricError(
                f"{name} needs {metric.frames} frames at least, the clip has {len(self.video)}"
            )

    def __call__(self, name: str) -> float:
        """The value of a metric of `METRICS`.

        Raises:
            MetricError: see `check`; or its network has no weights here, or others.
            ImportError: its package is not installed.
        """
        self.check(name)
        return METRICS[name].value(self)

    @cached_property
    def clip_images(self) -> ImageFeatures:
        """The clip's one pass through CLIP."""
        return self.models["clip"].images(self.video)

    def score(self, role: str, images: ImageFeatures) -> float:
        """Mean cosine of frames and prompt, times the scale that the model learned."""
        model = self.models[role]
        return model.scale * text_cosine(images.embeddings, model.text(self.prompt))

    def video_text(self) -> float:
        """Cosine of the prompt and eight frames, evenly spaced, seen together."""
        frames = len(self.video)
        picked = [frame * frames // VICLIP_FRAMES for frame in range(VICLIP_FRAMES)]
        video, text = self.models["viclip"](self.video[picked], self.prompt)
        return text_cosine(video[None], text)

    def flow_error(self, flow: Callable[[np.ndarray], Tensor]) -> float:
        """Mean end-point error, in pixels, between the flows of edit and source."""
        return end_point_error(flow(self.video), flow(self.source))

    def lpips(self, a: np.ndarray, b: np.ndarray) -> float:
        """Mean LPIPS between the frames of two clips, [F, H, W, 3] each."""
        net = self.models["lpips"]

        def scaled(frames: np.ndarray) -> Tensor:
            pixels = torch.from_numpy(frames).to(self.models.device)
            return pixels.permute(0, 3, 1, 2) / 127.5 - 1

        with torch.no_grad():
            distances = [
                net(scaled(a[f : f + BATCH]), scaled(b[f : f + BATCH])).flatten()
                for f in range(0, len(a), BATCH)
            ]
        return torch.cat(distances).mean().item()


def _frames(frames: np.ndarray) -> np.ndarray:
    frames = need("numpy").ascontiguousarray(frames)
    check_frames(frames)
    return frames


def opencv_flow(method: str) -> Callable[[np.ndarray], Tensor]:
    """Frames -> flow to the next one by OpenCV, float32 [F - 1, H, W, 2], in pixels.

    `optical_flow` refuses what no flow explains; a metric measures it.
    """

    def flow(frames: np.ndarray) -> Tensor:
        cv2 = flows.opencv()
        if min(frames.shape[1:3]) < 16:
            raise MetricError("optical flow needs frames of 16 pixels on a side at least")
        compute = flows.METHODS[method](cv2)
        gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
        return torch.stack([torch.from_numpy(compute(*pair)) for pair in itertools.pairwise(gray)])

    return flow


@dataclass(frozen=True)
class Metric:
    """A metric as data.

    Attributes:
        title: its name where it comes from.
        source: where it is defined.
        scale: range or unit.
        value: computes it.
        models: the networks it asks, of `ROLES`; OpenCV's flow is none.
        needs: what it needs beside the clip, of `NEEDS`.
        frames: the fewest it can be taken of.
        higher: whether more is better.
    """

    title: str
    source: str
    scale: str
    value: Callable[[Measurement], float]
    models: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    frames: int = 1
    higher: bool = True


NEEDS = {
    "source": "the source clip",
    "prompt": "the edit's prompt",
    "source_prompt": "the source's prompt",
}

METRICS = {
    "frames-quality": Metric(
        "Frames Quality", "V2VBench", "0 to 10",
        lambda m: m.models["aesthetic"](m.clip_images.embeddings).mean().item(),
        models=("clip", "aesthetic"),
    ),
    "video-quality": Metric(
        "Video Quality", "V2VBench", "0 to 1",
        lambda m: dover_score(*m.models["dover"](m.video)),
        models=("dover",),
    ),
    "semantic-consistency": Metric(
        "Semantic Consistency", "V2VBench", "0 to 1",
        lambda m: consecutive_cosine(m.clip_images.pooled, least=0),
        models=("clip",), frames=2,
    ),
    "object-consistency": Metric(
        "Object Consistency", "V2VBench", "0 to 1",
        lambda m: consecutive_cosine(m.models["dino"](m.video), least=0),
        models=("dino",), frames=2,
    ),
    "frames-text-alignment": Metric(
        "Frames Text Alignment", "V2VBench; EI2 and TCVE; StableVideo, times 100", "up to 100",
        lambda m: m.score("clip", m.clip_images),
        models=("clip",), needs=("prompt",),
    ),
    "frames-pick-score": Metric(
        "Frames Pick Score", "V2VBench; TCVE", "up to 100",
        lambda m: m.score("pickscore", m.models["pickscore"].images(m.video)),
        models=("pickscore",), needs=("prompt",),
    ),
    "video-text-alignment": Metric(
        "Video Text Alignment", "V2VBench", "-1 to 1",
        lambda m: m.video_text(),
        models=("viclip",), needs=("prompt",), frames=VICLIP_FRAMES,
    ),
    "motion-alignment": Metric(
        "Motion Alignment", "V2VBench", "-pixels",
        lambda m: -m.flow_error(m.models["gmflow"]),
        models=("gmflow",), needs=("source",), frames=2,
    ),
    # Another flow, another number: V2VBench's leaderboard does not compare with it.
    "motion-alignment-dis": Metric(
        "Motion Alignment by DIS", "V2VBench, but for the flow", "-pixels",
        lambda m: -m.flow_error(opencv_flow("dis")),
        needs=("source",), frames=2,
    ),
    "frame-consistency": Metric(
        "Frame Consistency", "TCVE; EI2, in %", "-1 to 1",
        lambda m: pairwise_cosine(m.clip_images.embeddings),
        models=("clip",), frames=2,
    ),
    "temporal-consistency": Metric(
        "Temporal Consistency", "BLD-AC", "-1 to 1",
        lambda m: consecutive_cosine(m.clip_images.embeddings),
        models=("clip",), frames=2,
    ),
    "frame-wise-accuracy": Metric(
        "Frame-wise Accuracy", "BLD-AC", "0 to 1",
        lambda m: frame_wise_accuracy(
            m.clip_images.embeddings, *map(m.models["clip"].text, (m.prompt, m.source_prompt))
        ),
        models=("clip",), needs=("prompt", "source_prompt"),
    ),
    "lpips-p": Metric(
        "LPIPS-P, from the source", "StableVideo, table 2", "0 and up",
        lambda m: m.lpips(m.video, m.source),
        models=("lpips",), needs=("source",), higher=False,
    ),
    "lpips-t": Metric(
        "LPIPS-T, between neighbours", "StableVideo, table 2", "0 and up",
        lambda m: m.lpips(m.video[1:], m.video[:-1]),
        models=("lpips",), frames=2, higher=False,
    ),
    "flow-distance": Metric(
        "Distance of Farneback's flow", "StableVideo, table 1", "pixels",
        lambda m: m.flow_error(opencv_flow("farneback")),
        needs=("source",), frames=2, higher=False,
    ),
}  # fmt: skip


def measure(
    names: Iterable[str],
    video: np.ndarray,
    *,
    source: np.ndarray | None = None,
    prompt: str | None = None,
    source_prompt: str | None = None,
    models: Models | None = None,
) -> dict[str, float]:
    """Metrics of one edited clip, by name.

    What can be told without a network, such as a missing prompt, is told before one is loaded.

    Args:
        names: of `METRICS`, which also gives scales and directions.
        video, source, prompt, source_prompt, models: see `Measurement`.
    Raises:
        MetricError, ImportError: the first metric that cannot be taken, and what it lacks.
    """
    names = list(names)
    measurement = Measurement(
        video, source=source, prompt=prompt, source_prompt=source_prompt, models=models
    )
    for name in names:
        measurement.check(name)
    return {name: measurement(name) for name in names}
