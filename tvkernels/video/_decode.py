"""Files to frames: clips through PyAV, folders of images through Pillow."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from tvkernels.video._files import VideoError, need, url
from tvkernels.video._filters import facts, needs, through, to_rgb
from tvkernels.video._images import images_in, read_image
from tvkernels.video._times import FOLDER_FPS, rate_of

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

CLIPS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif")

# FFmpeg's own decoders of these read no transparency.
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


@dataclass(frozen=True)
class Source:
    fps: Fraction
    pixel_aspect: Fraction
    promised: int  # frames the file says it has, 0 if it does not say
    count: int  # frames by their times: some of them may not be shown
    pictures: Iterator[Callable[[], np.ndarray]]  # called only for the frames that are wanted
    begins: Fraction = Fraction(0)  # seconds at which the first one is shown
    sound: int | None = None  # the stream that is heard beside it


@contextmanager
def open_source(path: Path, ground: str = "white") -> Iterator[Source]:
    """Frames of a clip or folder, laid on the colour ``ground`` where they are transparent."""
    if not path.exists():
        raise VideoError(f"{path} does not exist")
    if path.is_dir():
        files = images_in(path)
        pictures = (partial(read_image, file, ground) for file in files)
        yield Source(FOLDER_FPS, Fraction(1), len(files), len(files), pictures)
        return
    if path.suffix.lower() not in CLIPS:
        raise VideoError(
            f"{path} is not a clip that can be read: give {', '.join(CLIPS)} or a folder of images"
        )
    if path.stat().st_size == 0:
        raise VideoError(f"{path} is empty (0 bytes)")
    av = need("av")
    try:
        with av.open(url(path)) as container:
            rate, even, count = rate_of(container, _video(container, path))
        with av.open(url(path)) as container:
            yield _clip(container, path, rate, even, count, ground)
    except av.FFmpegError as error:
        raise VideoError(f"{path} is not a video that can be read: {error.strerror}") from error


def _video(container, path: Path):
    """The stream that a player shows; a cover picture is none."""
    moving = [s for s in container.streams.video if not _is_cover(s)]
    if not moving:
        raise VideoError(f"{path} holds no video stream")
    best = container.streams.best("video")
    return best if best in moving else moving[0]


def _is_cover(stream) -> bool:
    return bool(stream.disposition & need("av").stream.Disposition.attached_pic)


def _clip(container, path: Path, rate: Fraction, even: bool, count: int, ground: str) -> Source:
    stream = _video(container, path)
    stream.thread_type = "AUTO"
    frames, context = _decoded(container, stream), stream.codec_context
    first = next(frames, None)
    matrix = None if first is None else facts(first, context, path)
    frames = through(frames if first is None else chain([first], frames), needs(context))
    if not even:
        log.warning("%s has uneven frame times: read at %.6g frames a second", path, rate)
        constant = (("fps", f"fps={rate}:eof_action=pass"),)
        frames = through(frames, lambda frame: constant)
    turned = matrix is not None and abs(matrix[1]) > abs(matrix[0])
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    sound = container.streams.best("audio")
    return Source(
        rate,
        1 / aspect if turned else aspect,
        stream.frames if even else 0,
        count,
        (partial(to_rgb, frame, matrix, ground) for frame in frames),
        (stream.start_time or 0) * Fraction(stream.time_base or 1),
        None if sound is None else sound.index,
    )


def _decoded(container, stream) -> Iterator:
    name = WITH_ALPHA.get(stream.codec_context.name)
    if name is None or stream.metadata.get("alpha_mode") != "1":
        yield from container.decode(stream)
        return
    decoder = need("av").CodecContext.create(name, "r")
    for packet in container.demux(stream):
        yield from decoder.decode(packet)
