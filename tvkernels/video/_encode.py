"""Frames to files: H.264 in mp4, gif, folders of PNG files. Callers have checked everything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import chain
from pathlib import Path
from queue import Full, Queue
from typing import TYPE_CHECKING

from tvkernels.video._audio import Audio, on_track, opened
from tvkernels.video._files import need, url

if TYPE_CHECKING:
    import numpy as np

QUEUED = 16  # frames that wait for the encoder at most


def mp4(
    path: Path, frames: Iterable[np.ndarray], fps: Fraction, audio: Audio | None = None
) -> None:
    av, np = need("av"), need("numpy")
    frames = iter(frames)
    first = next(frames)
    sides = [(0, side % 2) for side in first.shape[:2]]
    with (
        opened(audio) as sound,
        av.open(url(path), "w", options={"movflags": "+faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=fps, options={"crf": "16"})
        stream.height, stream.width = (side + side % 2 for side in first.shape[:2])
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        # Untagged clips are shown as BT.601 or BT.709 depending on the player: say which it is.
        context.colorspace = context.color_primaries = context.color_trc = 1
        context.color_range = 1
        heard = []
        if sound is not None:
            template, packets = sound
            heard = on_track(packets, container.add_stream_from_template(template))[::-1]
        for index, frame in enumerate(chain([first], frames)):
            while heard and heard[-1].pts * heard[-1].time_base <= index / fps:
                container.mux(heard.pop())
            frame = np.pad(frame, (*sides, (0, 0)), mode="edge")
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
            )
            container.mux(stream.encode(picture))
        container.mux(heard[::-1])
        container.mux(stream.encode(None))


def gif(path: Path, frames: Iterable[np.ndarray], fps: Fraction) -> None:
    av = need("av")
    tick = Fraction(1, 100)
    frames = iter(frames)
    first = next(frames)
    height, width = first.shape[:2]
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=width, height=height, format=av.VideoFormat("rgb24"), time_base=tick
    )
    split, sink = graph.add("split"), graph.add("buffersink")
    # One palette for the whole clip: a palette for each frame flickers.
    palette = graph.add("palettegen", "reserve_transparent=0")
    paint = graph.add("paletteuse", "dither=sierra2_4a")
    for giver, output, taker, entry in (
        (source, 0, split, 0),
        (split, 0, palette, 0),
        (split, 1, paint, 0),
        (palette, 0, paint, 1),
        (paint, 0, sink, 0),
    ):
        giver.link_to(taker, output, entry)
    graph.configure()
    count = 0
    for count, frame in enumerate(chain([first], frames), 1):
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture.pts, picture.time_base = round((count - 1) * 100 / fps), tick
        source.push(picture)
    source.push(None)
    with av.open(url(path), "w") as container:
        stream = container.add_stream("gif", rate=fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "pal8"
        stream.time_base = stream.codec_context.time_base = tick
        for _ in range(count):
            container.mux(stream.encode(sink.pull()))
        container.mux(stream.encode(None))


def folder(path: Path, frames: Iterable[np.ndarray], fps: Fraction) -> None:
    path.mkdir()
    names = []
    for index, frame in enumerate(frames):
        names.append(path / f"{index:04}.png")
        need("PIL.Image").fromarray(frame).save(names[-1])
    digits = len(str(len(names) - 1))
    for name in names if digits > 4 else ():
        name.rename(path / f"{name.stem:0>{digits}}.png")


ENCODERS = {".mp4": mp4, ".gif": gif, "": folder}
OUTPUTS = tuple(ENCODERS)


def as_they_come(
    encode: Callable, path: Path, frames: Iterator[np.ndarray], fps: Fraction
) -> None:
    """Encodes in a thread of its own while the calling thread makes the frames that follow.

    An error or an interrupt on either side stops the other, and is raised here. What it saves is
    memory. On a CPU it saves no time: 32 frames of 256 x 256 out of the demo's VAE took 4.37 s
    against 4.34 s one after the other as mp4, 4.81 against 4.80 as gif (one thread, medians of 8,
    interleaved), for decoding is nearly all of it. On a GPU it is not measured.
    """
    waiting: Queue = Queue(QUEUED)

    def taken() -> Iterator[np.ndarray]:
        for kind, frame in iter(waiting.get, ("end", None)):
            if kind == "stop":
                raise RuntimeError("no more frames will come")
            yield frame

    with ThreadPoolExecutor(1) as pool:
        encoding = pool.submit(encode, path, taken(), fps)

        def give(kind: str, frame: np.ndarray | None = None) -> bool:
            """Whether the encoder takes it, which it does not once it has failed."""
            while not encoding.done():
                try:
                    waiting.put((kind, frame), timeout=0.1)
                    return True
                except Full:
                    continue
            return False

        try:
            if all(give("frame", frame) for frame in frames):
                give("end")
        except BaseException:
            give("stop")
            raise
        encoding.result()
