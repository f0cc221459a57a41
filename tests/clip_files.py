"""Files that `write_video` does not write: other containers, codecs, headers, times and sound."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def encode(
    path: Path, clip, codec="libx264", pix_fmt="yuv420p", fps=8, prepare=None, times=None,
    time_base=None, options=None, source="rgb24", setfield=None, sound=None,
) -> Path:  # fmt: skip
    """A file of the frames, uint8 [F, H, W, 3 or 4] or ready frames of PyAV.

    Args:
        prepare: gets the stream before anything is encoded.
        times: of each frame, in units of ``time_base``.
        setfield: marks the frames as interlaced: "tff" or "bff".
        sound: (codec, samples float32 [N], rate, start in seconds).
    """
    first = clip[0]
    height, width = (
        first.shape[:2] if isinstance(first, np.ndarray) else (first.height, first.width)
    )
    with av.open(f"file:{path}", "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        if time_base:
            stream.time_base = stream.codec_context.time_base = time_base
        if prepare:
            prepare(stream)
        heard = None if sound is None else container.add_stream(sound[0], rate=sound[2])
        if heard is not None:
            heard.layout = "mono"
        for index, frame in enumerate(clip):
            if isinstance(frame, np.ndarray):
                frame = av.VideoFrame.from_ndarray(frame, format=source)
            if times is not None:
                frame.pts, frame.time_base = times[index], time_base
            if setfield:
                frame = _marked(frame, setfield)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if heard is not None:
            _, samples, rate, start = sound
            frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
            frame.rate, frame.pts, frame.time_base = rate, round(start * rate), Fraction(1, rate)
            container.mux(heard.encode(frame))
            container.mux(heard.encode(None))
    return path


def _marked(frame, field: str):
    graph = av.filter.Graph()
    time_base = frame.time_base or Fraction(1, 8)
    nodes = [
        graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=time_base
        ),
        graph.add("setfield", field),
        graph.add("buffersink"),
    ]
    graph.link_nodes(*nodes).configure()
    graph.push(frame)
    return graph.pull()


def with_matrix(path: Path, matrix: tuple[int, ...]) -> Path:
    """The mp4 with the nine numbers of another display matrix."""
    data = path.read_bytes()
    at = data.find(b"tkhd") + 44
    path.write_bytes(data[:at] + struct.pack(">9i", *matrix) + data[at + 36 :])
    return path


def sound_of(path: Path) -> tuple[np.ndarray, int]:
    """What is heard of a file: float32 [N] from the time 0 on, and its rate."""
    with av.open(f"file:{path}") as container:
        stream = container.streams.audio[0]
        rate = stream.rate
        heard = np.zeros(0, np.float32)
        resampler = av.AudioResampler("fltp", "mono", rate)
        for frame in container.decode(stream):
            at = round(frame.time * rate)
            for piece in resampler.resample(frame):
                samples = piece.to_ndarray()[0]
                heard = np.pad(heard, (0, max(0, at + len(samples) - len(heard))))
                samples = samples[max(0, -at) :]
                heard[max(0, at) : max(0, at) + len(samples)] = samples
                at += piece.samples
        return heard, rate
