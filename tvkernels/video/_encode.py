"""Frames to files: H.264 in mp4, gif, folders of PNG files. Callers have checked everything."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from tvkernels.video._files import need

if TYPE_CHECKING:
    import numpy as np


def mp4(path: Path, frames: np.ndarray, fps: Fraction) -> None:
    av, np = need("av"), need("numpy")
    odd_height, odd_width = (side % 2 for side in frames.shape[1:3])
    frames = np.pad(frames, ((0, 0), (0, odd_height), (0, odd_width), (0, 0)), mode="edge")
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "16"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        # Untagged clips are shown as BT.601 or BT.709 depending on the player: say which it is.
        context.colorspace = context.color_primaries = context.color_trc = 1
        context.color_range = 1
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def gif(path: Path, frames: np.ndarray, fps: Fraction) -> None:
    av = need("av")
    tick = Fraction(1, 100)
    height, width = frames.shape[1:3]
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
    for index, frame in enumerate(frames):
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture.pts, picture.time_base = round(index * 100 / fps), tick
        source.push(picture)
    source.push(None)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("gif", rate=fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "pal8"
        stream.time_base = stream.codec_context.time_base = tick
        for _ in frames:
            container.mux(stream.encode(sink.pull()))
        container.mux(stream.encode(None))


def folder(path: Path, frames: np.ndarray, fps: Fraction) -> None:
    path.mkdir()
    digits = max(4, len(str(len(frames) - 1)))
    for index, frame in enumerate(frames):
        need("PIL.Image").fromarray(frame).save(path / f"{index:0{digits}}.png")


ENCODERS = {".mp4": mp4, ".gif": gif, "": folder}
OUTPUTS = tuple(ENCODERS)
