"""Files to frames: clips through PyAV, folders of images through Pillow."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tvkernels.video._files import VideoError, need

if TYPE_CHECKING:
    import numpy as np

CLIPS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

# A folder of images has no frame rate; 8 is what Tune-A-Video shows its clips at.
FOLDER_FPS = Fraction(8)


@dataclass(frozen=True)
class Source:
    fps: Fraction
    pixel_aspect: Fraction
    promised: int  # frames the file says it has, 0 if it does not say
    pictures: Iterator[Callable[[], np.ndarray]]  # called only for the frames that are wanted


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    if not path.exists():
        raise VideoError(f"{path} does not exist")
    if path.is_dir():
        yield _folder(path)
        return
    if path.suffix.lower() not in CLIPS:
        raise VideoError(
            f"{path} is not a clip that can be read: give {', '.join(CLIPS)} or a folder of images"
        )
    if path.stat().st_size == 0:
        raise VideoError(f"{path} is empty (0 bytes)")
    av = need("av")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError(f"{path} holds no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            frames = container.decode(stream)
            yield Source(
                _rate(stream, path),
                stream.sample_aspect_ratio or Fraction(1),
                stream.frames,
                (partial(_upright, frame) for frame in frames),
            )
    except av.FFmpegError as error:
        raise VideoError(f"{path} is not a video that can be read: {error.strerror}") from error


def _rate(stream, path: Path) -> Fraction:
    if path.suffix.lower() == ".gif" and stream.frames and stream.duration:
        rate = stream.frames / (stream.duration * stream.time_base)
        whole = Fraction(max(1, round(rate)))
        # Delays are whole hundredths of a second: 8 frames a second are stored as 12, 13, 12, ...
        rounding = abs(stream.frames / whole - stream.frames / rate)
        return whole if rounding <= Fraction(1, 100) else rate
    return stream.average_rate or stream.guessed_rate or FOLDER_FPS


def _upright(frame) -> np.ndarray:
    quarter_turns = round(frame.rotation / 90) % 4
    return need("numpy").rot90(frame.to_ndarray(format="rgb24"), quarter_turns)


def natural_order(file: Path) -> list:
    """A key under which frame 2 comes before frame 10."""
    parts = re.split(r"(\d+)", file.name)
    return [int(part) if part.isdigit() else part.lower() for part in parts]


def _folder(path: Path) -> Source:
    files = [file for file in path.iterdir() if file.suffix.lower() in IMAGES]
    pictures = (partial(_image, file) for file in sorted(files, key=natural_order))
    return Source(FOLDER_FPS, Fraction(1), len(files), pictures)


def eight_bits(picture):
    """A PIL image, one of 16 bits scaled to 8: Pillow would cut it off at 255."""
    if not picture.mode.startswith("I"):
        return picture
    values = need("numpy").asarray(picture).clip(0, 65535) // 257
    return need("PIL.Image").fromarray(values.astype("uint8"))


def _image(file: Path) -> np.ndarray:
    image = need("PIL.Image")
    try:
        with image.open(file) as picture:
            upright = eight_bits(need("PIL.ImageOps").exif_transpose(picture))
            if "A" in upright.getbands() or "transparency" in upright.info:
                upright = upright.convert("RGBA")
                white = image.new("RGBA", upright.size, "white")
                upright = image.alpha_composite(white, upright)
            return need("numpy").asarray(upright.convert("RGB"))
    except OSError as error:
        raise VideoError(f"{file} is not an image that can be read: {error}") from error
