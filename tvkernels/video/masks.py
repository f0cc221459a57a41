"""Masks that the user gives: an image for every frame, a video, or a folder of images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tvkernels.video._decode import CLIPS, open_source
from tvkernels.video._files import VideoError, need
from tvkernels.video._images import IMAGES, read_image

if TYPE_CHECKING:
    import numpy as np

    from tvkernels.video._fit import Fit

# The brightest channel decides: white and the dark colours of annotation palettes, (128, 0, 0)
# and the like, are inside, black and what a video's coding leaves of it are not.
INSIDE = 128


def read_mask(
    path: str | os.PathLike,
    frames: int,
    size: tuple[int, int],
    fit: Fit | None = None,
    start: int = 0,
    stride: int = 1,
) -> np.ndarray:
    """A clip's mask, true where the object is.

    Args:
        path: an image, which then holds for every frame, or a video or folder of images (natural
            order) with one for each frame that is taken, or for each of the whole clip. Bright
            or coloured is inside, black and transparent outside.
        frames: frames of the clip it belongs to.
        size: (height, width) of them in pixels.
        fit: of the clip, which masks of its source's size are then given too.
        start, stride: of the frames taken, as `read_video` has them: a mask of the whole clip
            follows them.
    Returns:
        bool [F, H, W].
    Raises:
        VideoError: no such file, another number of frames or another size, or no pixel inside.
    """
    path, np = Path(path), need("numpy")
    still = path.suffix.lower() in IMAGES and not path.is_dir()
    wanted = range(start, start + frames * stride, stride)
    first, taken, count = [], [], 0  # as the frames are taken, or as the whole clip's are
    for index, picture in enumerate(_pictures(path)):
        if fit is not None and picture.shape[:2] == fit.source:
            picture = fit(picture)
        if picture.shape[:2] != tuple(size):
            source = f", resized from {fit.source[1]} x {fit.source[0]}" if fit else ""
            raise VideoError(
                f"{path}: the mask of frame {index} is {picture.shape[1]} x {picture.shape[0]} "
                f"pixels, the clip's frames are {size[1]} x {size[0]}{source}: "
                "give it at their size"
            )
        inside, count = picture.max(-1) >= INSIDE, index + 1
        if index < frames:
            first.append(inside)
        if index in wanted:
            taken.append(inside)
    each = still or count == frames or (start, stride) == (0, 1)
    kept = first if each else taken
    if not still and (count if each else len(taken)) != frames:
        least = "" if each else f", or {wanted[-1] + 1} and more for the whole clip"
        raise VideoError(
            f"{path} has {count} masks, {frames} frames are taken of the clip: give one for each "
            f"frame{least}, or a single image for all of them"
        )
    mask = np.stack(kept)
    if not mask.any():
        raise VideoError(
            f"{path} marks nothing: pixels of {INSIDE} and more in any channel are inside"
        )
    return np.repeat(mask, frames, 0) if still else mask


def _pictures(path: Path) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3] each: as clips are read, but what is transparent is outside, not white."""
    if path.is_dir() or path.suffix.lower() in CLIPS:
        with open_source(path, "black") as source:
            for picture in source.pictures:
                yield picture()
    elif not path.exists():
        raise VideoError(f"{path} does not exist")
    elif path.suffix.lower() in IMAGES:
        yield read_image(path, "black")
    else:
        known = ", ".join((*IMAGES, *CLIPS))
        raise VideoError(f"{path} is not a mask that can be read: give {known} or a folder")
