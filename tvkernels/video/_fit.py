"""Which part of a frame is kept, and at which size."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from tvkernels.video._files import VideoError, need

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Fit:
    """Result size in pixels, the box (left, top, right, bottom) of the source that fills it, and
    the source's own (height, width).
    """

    height: int
    width: int
    box: tuple[float, float, float, float]
    source: tuple[int, int]

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        """Cut and resample one frame, uint8 [H, W, 3] -> uint8 [height, width, 3]."""
        left, top, right, bottom = self.box
        if (bottom - top, right - left) == (self.height, self.width):
            return frame[int(top) : int(bottom), int(left) : int(right)]
        image = need("PIL.Image")
        picture = image.fromarray(frame).resize(
            (self.width, self.height), image.Resampling.LANCZOS, box=self.box
        )
        return need("numpy").asarray(picture)


def plan(
    height: int,
    width: int,
    size: int | tuple[int, int] | None,
    multiple: int,
    crop: bool = True,
    pixel_aspect: Fraction = Fraction(1),
) -> Fit:
    """Decide how frames of ``height`` x ``width`` pixels are fitted.

    Args:
        size: pixels of the shorter side, or (height, width), or None for the clip's own size.
        multiple: both sides of the result are multiples of this.
        crop: cover the result and cut what hangs over, the same on both sides; False squeezes
            the whole frame into the result instead.
        pixel_aspect: width of a source pixel over its height.

    Raises:
        VideoError: a size that is no multiple, or a clip smaller than one multiple.
    """
    shown = float(width * pixel_aspect)
    new_height, new_width = _target(height, shown, size, multiple)
    if not crop:
        return Fit(new_height, new_width, (0, 0, width, height), (height, width))
    if size is None and pixel_aspect == 1:
        left, top = (width - new_width) // 2, (height - new_height) // 2
        box = (left, top, left + new_width, top + new_height)
        return Fit(new_height, new_width, box, (height, width))
    scale = max(new_height / height, new_width / shown)
    half_height = min(new_height / scale, height) / 2
    half_width = min(new_width / scale / float(pixel_aspect), width) / 2
    box = (
        width / 2 - half_width,
        height / 2 - half_height,
        width / 2 + half_width,
        height / 2 + half_height,
    )
    return Fit(new_height, new_width, box, (height, width))


def _target(height: int, width: float, size, multiple: int) -> tuple[int, int]:
    if multiple < 1:
        raise VideoError(f"multiple must be at least 1, not {multiple}")
    if size is None:
        target = _floor(height, multiple), _floor(width, multiple)
        if 0 in target:
            raise VideoError(
                f"frames of {width:.0f} x {height} pixels are smaller than {multiple} on a side: "
                f"ask for a size, such as size={multiple}"
            )
        return target
    for side in (size,) if isinstance(size, int) else size:
        if side < multiple or side % multiple:
            near = max(_floor(side, multiple), multiple)
            raise VideoError(
                f"size {side} cannot be reached: sides are multiples of {multiple}, "
                f"such as {near} or {near + multiple}"
            )
    if not isinstance(size, int):
        return tuple(size)
    scale = size / min(height, width)
    # The shorter side is exactly `size`; only the longer one is rounded.
    return tuple(
        size if side * scale <= size else _floor(round(side * scale, 6), multiple)
        for side in (height, width)
    )


def _floor(side: float, multiple: int) -> int:
    return int(side // multiple) * multiple
