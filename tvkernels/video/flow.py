"""Optical flow between neighbouring frames by OpenCV, and where forward and backward agree."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from tvkernels.video._files import VideoError, need

if TYPE_CHECKING:
    import numpy as np

# A flow is believed where going there and back ends within a pixel, or a tenth of the way.
ROUND_TRIP, ROUND_TRIP_SHARE = 1.0, 0.1
# A flow explains a pixel where the frame it leads to is within so many levels of gray. Where it
# explains under half of a frame there is none: three real clips and twelve scenes of the shapes
# world at 128 x 128 are explained in 0.93 and more, noise in 0.21, a cut in 0.10 (DIS and
# Farneback, OpenCV 5.0).
EXPLAINED_LEVELS = 16
LEAST_EXPLAINED = 0.5


@dataclass(frozen=True)
class Flow:
    """Where each pixel goes, in pixels.

    Attributes:
        forward: float32 [F - 1, H, W, 2], (dx, dy) from frame f to f + 1.
        backward: float32 [F - 1, H, W, 2], from frame f + 1 to f.
        trusted: bool [F - 1, H, W], forward stays inside, comes back and explains the pixel.
    """

    forward: np.ndarray
    backward: np.ndarray
    trusted: np.ndarray


def opencv() -> ModuleType:
    """OpenCV, imported on first use, or ImportError naming the extra that brings it."""
    try:
        return importlib.import_module("cv2")
    except ImportError as error:
        raise ImportError(
            "optical flow needs opencv, which is not installed: pip install 'tvkernels[atlas]'"
        ) from error


def optical_flow(frames: np.ndarray, method: str = "dis") -> Flow:
    """Flow of a clip in both directions.

    Args:
        frames: uint8 [F, H, W, 3].
        method: "dis" (dense inverse search, Kroeger et al. 2016) or "farneback" (2003, with the
            numbers of OpenCV's documentation).
    Raises:
        VideoError: unknown method, frames under 16 pixels, or a frame that the next one does not
            follow from, such as across a cut.
        ImportError: the extra ``tvkernels[atlas]`` is not installed.
    """
    cv2, np = opencv(), need("numpy")
    if method not in METHODS:
        raise VideoError(f"unknown optical flow {method!r}: use one of {', '.join(METHODS)}")
    if min(frames.shape[1:3]) < 16:
        raise VideoError(
            f"frames of {frames.shape[2]} x {frames.shape[1]} pixels are too small for optical "
            "flow: 16 on a side at least"
        )
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    pairs = list(itertools.pairwise(gray))
    empty = np.zeros((0, *frames.shape[1:3], 2), np.float32)
    if not pairs:
        return Flow(empty, empty, np.zeros(empty.shape[:3], bool))
    compute = METHODS[method](cv2)
    forward = np.stack([compute(a, b) for a, b in pairs])
    backward = np.stack([compute(b, a) for a, b in pairs])
    trusted = np.stack(
        [_agree(there, back) for there, back in zip(forward, backward, strict=True)]
    )
    for f, (a, b) in enumerate(pairs):
        led_to = warp(b, forward[f])
        explained = np.abs(a.astype(np.int16) - led_to) <= EXPLAINED_LEVELS
        if explained.mean() < LEAST_EXPLAINED:
            raise VideoError(
                f"no optical flow from frame {f} to {f + 1}: it explains {explained.mean():.0%} "
                "of the pixels; take frames without a cut, or a smaller stride"
            )
        trusted[f] &= explained
    return Flow(forward, backward, trusted)


def warp(picture: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """picture[p + flow[p]] for every pixel p, bilinear, the border's value outside."""
    cv2, np = opencv(), need("numpy")
    h, w = flow.shape[:2]
    x, y = np.meshgrid(np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32))
    return cv2.remap(
        picture, x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )  # fmt: skip


def _dis(cv2):
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return lambda a, b: search.calc(a, b, None).copy()


def _farneback(cv2):
    return lambda a, b: cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 15, 3, 5, 1.2, 0)


# OpenCV -> two gray frames -> flow from the first to the second.
METHODS = {"dis": _dis, "farneback": _farneback}


def _agree(there: np.ndarray, back: np.ndarray) -> np.ndarray:
    np = need("numpy")
    h, w = there.shape[:2]
    off = np.linalg.norm(there + warp(back, there), axis=-1)
    x = np.arange(w) + there[..., 0]
    y = np.arange(h)[:, None] + there[..., 1]
    inside = (x >= 0) & (x <= w - 1) & (y >= 0) & (y <= h - 1)
    return inside & (off <= ROUND_TRIP + ROUND_TRIP_SHARE * np.linalg.norm(there, axis=-1))
