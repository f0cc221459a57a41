"""Clips between files and arrays, through PyAV (whose wheel carries FFmpeg)."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tvkernels.video._audio import Audio
from tvkernels.video._decode import open_source
from tvkernels.video._encode import ENCODERS, OUTPUTS, as_they_come, mp4
from tvkernels.video._files import VideoError, atomic_path, check_output, need
from tvkernels.video._fit import Fit, plan

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

# Viewers play a GIF's delays under two hundredths of a second at a tenth.
GIF_MAX_FPS = 50


@dataclass(frozen=True)
class Video:
    """A clip in memory.

    Attributes:
        frames: uint8 RGB, [F, H, W, 3].
        fps: frames a second at which ``frames`` play at the speed of the file.
        path: the file or folder it was read from.
        fit: how its frames were cut and resized.
        audio: the sound beside them, None where there is none; `write_video` takes it.
    """

    frames: np.ndarray
    fps: Fraction
    path: Path
    fit: Fit | None = None
    audio: Audio | None = None

    def __len__(self) -> int:
        return len(self.frames)


def read_video(
    path: str | os.PathLike,
    *,
    start: int = 0,
    stride: int = 1,
    frames: int | None = None,
    size: int | tuple[int, int] | None = None,
    multiple: int = 8,
    crop: bool = True,
) -> Video:
    """Read a clip, turned upright, cut and resized to sides a model accepts.

    Args:
        path: mp4, m4v, mov, webm, mkv, avi or gif, or a folder of images (natural order, 8 fps).
            Frames are what a player shows: turned and mirrored, deinterlaced, on white where
            they are transparent, HDR and BT.2020 as BT.709. Uneven frame times become the rate of
            most frames, which is said; ``start``, ``stride`` and ``frames`` count at it.
        start: first frame to keep, from 0.
        stride: keep every ``stride``-th frame; the returned fps is the file's over this.
        frames: number of frames to keep, None for all that follow.
        size: pixels of the shorter side, or (height, width); None keeps the clip's own scale.
        multiple: both sides of the result are multiples of this.
        crop: keep the proportions and cut the overhang at the centre; False squeezes instead.

    Returns:
        Video with frames uint8 [F, H, W, 3].

    Raises:
        VideoError: no such file, not a video, no frames, fewer frames than asked for, or a size
            that cannot be reached.
        ImportError: the extra ``tvkernels[video]`` is not installed.
    """
    path = Path(path)
    for name, value, least in (("start", start, 0), ("stride", stride, 1), ("frames", frames, 1)):
        if value is not None and value < least:
            raise VideoError(f"{name} must be at least {least}, not {value}")
    wanted = range(start, sys.maxsize if frames is None else start + frames * stride, stride)
    kept, fit, shape, index = [], None, None, -1
    with open_source(path) as source:
        for index, picture in enumerate(source.pictures):
            if index not in wanted:
                continue
            frame = picture()
            if fit is None:
                shape = frame.shape
                fit = plan(*shape[:2], size, multiple, crop, source.pixel_aspect)
            if frame.shape != shape:
                raise VideoError(
                    f"{path}: frame {index} is {frame.shape[1]} x {frame.shape[0]} pixels, "
                    f"the ones before are {shape[1]} x {shape[0]}; all must be of one size"
                )
            kept.append(fit(frame))
            if len(kept) == frames:
                break
        else:
            if 0 <= index < source.promised - 1:
                # Not an error: edited clips rightly show fewer frames than they store.
                log.warning(
                    "%s says it has %d frames, %d could be decoded; is it cut short?",
                    path,
                    source.promised,
                    index + 1,
                )
    _check_count(path, index + 1, len(kept), start, stride, frames)
    audio = None
    if source.sound is not None:
        begins = source.begins + start / source.fps
        audio = Audio(path, source.sound, begins, begins + len(kept) * stride / source.fps)
    return Video(need("numpy").stack(kept), source.fps / stride, path, fit, audio)


def write_video(
    path: str | os.PathLike,
    frames: np.ndarray | Sequence | Iterator,
    fps: Fraction | float,
    audio: Audio | None = None,
) -> Path:
    """Write a clip: ``.mp4`` (H.264), ``.gif``, or, without an ending, a folder of PNG files.

    The file appears whole or not at all, also when the disk is full or the user interrupts.
    An mp4 is 4:2:0, so an odd side is made even by repeating its last row or column.

    Args:
        path: output; missing parent folders are created, an existing file is replaced.
        frames: uint8 RGB [F, H, W, 3], or a sequence of such arrays or PIL images. An iterator
            is encoded as its frames come, with no more than a few of them in memory; the file is
            the same to the byte.
        fps: frames a second; at most 50 for a GIF, not stored with PNG files.
        audio: sound that an mp4 gets, of `Video`: copied where players take it in an mp4, else as
            AAC. What cannot be kept (a GIF, a folder, a broken stream) is left out with a warning.

    Returns:
        The path written.

    Raises:
        VideoError: wrong frames or rate, an ending that is not written, or a failed write.
    """
    path = check_output(path, OUTPUTS)
    streamed = isinstance(frames, Iterator)
    frames = _checked_one_by_one(frames) if streamed else _checked(frames)
    if not 0 < fps < math.inf:
        raise VideoError(f"fps must be above 0 and finite, not {float(fps):g}")
    fps = Fraction(fps).limit_denominator(1001)
    if path.suffix.lower() == ".gif" and fps > GIF_MAX_FPS:
        raise VideoError(
            f"a GIF plays at most {GIF_MAX_FPS} frames a second, not {float(fps):g}: write an mp4"
        )
    av = need("av")
    with atomic_path(path) as temporary:
        try:
            encode = ENCODERS[path.suffix.lower()]
            if audio is not None and encode is mp4:
                encode = partial(encode, audio=audio)
            elif audio is not None:
                log.warning("%s holds no sound: it is left out, an mp4 keeps it", path)
            if streamed:
                as_they_come(encode, temporary, frames, fps)
            else:
                encode(temporary, frames, fps)
        except av.FFmpegError as error:
            raise VideoError(f"cannot write {path}: {error.strerror}") from error
    return path


def _check_count(path: Path, total: int, kept: int, start: int, stride: int, frames) -> None:
    if total == 0:
        raise VideoError(f"{path} holds no frames")
    if kept == 0:
        raise VideoError(f"{path} has {total} frames: start must be under {total}, not {start}")
    if frames is not None and kept < frames:
        where = f" from frame {start}" if start else ""
        where += f" at stride {stride}" if stride > 1 else ""
        raise VideoError(
            f"{path} has {total} frames, which gives {kept}{where}, not {frames}: "
            f"ask for at most {kept}"
        )


def _checked(frames) -> np.ndarray:
    np = need("numpy")
    array = frames if isinstance(frames, np.ndarray) else None
    if array is None:
        pictures = [np.asarray(frame) for frame in frames]
        if len({picture.shape for picture in pictures}) > 1:
            raise VideoError("frames must all be of one size")
        array = np.stack(pictures) if pictures else np.empty(0)
    check_frames(array)
    return np.ascontiguousarray(array)


def _checked_one_by_one(frames: Iterator) -> Iterator[np.ndarray]:
    """The same checks; the first frame is asked for here, so that nothing is begun without one."""
    np = need("numpy")
    first = next(frames, None)
    first = np.empty(0) if first is None else np.asarray(first)[None]
    check_frames(first)

    def rest() -> Iterator[np.ndarray]:
        yield np.ascontiguousarray(first[0])
        for frame in frames:
            frame = np.asarray(frame)
            if frame.shape != first.shape[1:]:
                raise VideoError("frames must all be of one size")
            check_frames(frame[None])
            yield np.ascontiguousarray(frame)

    return rest()


def check_frames(array: np.ndarray) -> None:
    """Raises VideoError unless it is uint8 [F, H, W, 3] with a frame at least."""
    np = need("numpy")
    if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8 or not array.size:
        raise VideoError(
            "frames must be uint8 [F, H, W, 3] with at least one frame, "
            f"not {array.dtype} {list(array.shape)}"
        )
