"""What frames need until they are what a player shows: FFmpeg's filters, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tvkernels.video._files import VideoError, need
from tvkernels.video._images import on

if TYPE_CHECKING:
    import numpy as np

Filters = tuple[tuple[str, str], ...]

# Numbers of ITU-T H.273.
BT709, UNTAGGED, BT2020 = 1, 2, (9, 10)
PQ, HLG = 16, 18

DEINTERLACE = ("bwdif", "mode=send_frame:deint=interlaced")
# Tone mapping and gamut in one table, 2.9 s once a clip. White of HLG (75 %) and of PQ (203 cd/m2)
# becomes 253, a BT.709 red (230, 25, 1) and (255, 28, 0).
TONE_MAP = (("scale", "out_primaries=bt709:out_transfer=bt709"), ("format", "rgb24"))
# `scale` bends saturated colours of SDR clips (a BT.709 blue became (0, 120, 215)), this does not.
NARROW = (("colorspace", "iall=bt2020:all=bt709:format=yuv444p"),)

# Dolby Vision that no other decoder shows: these tags, and nothing said of the colours.
DOLBY_TAGS = ("dvh1", "dvhe", "dva1", "dvav", "dav1")


def needs(context) -> Callable[[object], Filters]:
    """A function of a frame that says which filters it needs; () for most.

    Args:
        context: of the codec, which knows what the container and the frames so far have said.
    """
    interlaced = False

    def filters(frame) -> Filters:
        nonlocal interlaced
        interlaced = interlaced or frame.interlaced_frame
        return ((DEINTERLACE,) if interlaced else ()) + _colours(frame, context)

    return filters


def _colours(frame, context) -> Filters:
    curve, primaries, matrix = context.color_trc, context.color_primaries, frame.colorspace
    if curve in (PQ, HLG):
        # A clip may name its curve alone.
        named = [
            f"{name}={value}"
            for name, value, said in (
                ("color_primaries", "bt2020", primaries),
                ("colorspace", "bt2020nc", matrix),
            )
            if said == UNTAGGED
        ]
        return ((("setparams", ":".join(named)),) if named else ()) + TONE_MAP
    wide = primaries in BT2020 or (primaries == UNTAGGED and matrix in BT2020)
    return NARROW if wide and not frame.format.is_rgb else ()


def facts(frame, context, path: Path) -> tuple[int, ...] | None:
    """The display matrix of a clip, from its first frame; None where frames are shown as they lie.

    For the first frame alone: PyAV's side data keep a frame in memory until garbage is collected
    (91 frames of 718 x 718 held 160 MB more).

    Raises:
        VideoError: Dolby Vision without a picture that others can show.
    """
    try:
        found = {name: frame.side_data.get(name) for name in ("DISPLAYMATRIX", "DOVI_METADATA")}
    except ValueError:  # PyAV up to 18, beside a kind that it does not know
        found = dict.fromkeys(("DISPLAYMATRIX", "DOVI_METADATA"))
    dolby = context.codec_tag in DOLBY_TAGS or found["DOVI_METADATA"] is not None
    if dolby and context.color_trc == UNTAGGED:
        raise VideoError(
            f"{path} is Dolby Vision that only its own decoders show (profile 5): "
            "export it as HDR10, HLG or SDR"
        )
    matrix = found["DISPLAYMATRIX"]
    return None if matrix is None else tuple(memoryview(bytes(matrix)).cast("i"))


def through(frames: Iterable, filters: Callable[[object], Filters]) -> Iterator:
    """Frames through the filters that each needs. A graph is built where these change."""
    graph, key = None, None
    for frame in frames:
        wanted = filters(frame)
        now = (wanted, frame.format.name, frame.width, frame.height) if wanted else None
        if now != key:
            yield from _finished(graph)
            graph, key = _graph(frame, wanted) if wanted else None, now
        if graph is None:
            yield frame
        else:
            graph.push(frame)
            yield from ready(graph)
    yield from _finished(graph)


def _graph(frame, filters: Filters):
    av = need("av")
    graph = av.filter.Graph()
    entry = (
        f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}"
        f":time_base={frame.time_base}:colorspace={frame.colorspace}:range={frame.color_range}"
    )
    try:
        nodes = [graph.add(name, words) for name, words in (("buffer", entry), *filters)]
        graph.link_nodes(*nodes, graph.add("buffersink")).configure()
    except (av.FFmpegError, ValueError) as error:
        names = ", ".join(name for name, _ in filters)
        raise VideoError(
            f"this PyAV ({av.__version__}) cannot filter the clip ({names}: {error}): "
            "install PyAV 16 or newer"
        ) from error
    return graph


def ready(graph) -> Iterator:
    """The frames that are ready in a graph, of pictures or of sound."""
    av = need("av")
    while True:
        try:
            yield graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return


def _finished(graph) -> Iterator:
    if graph is not None:
        graph.push(None)
        yield from ready(graph)


def to_rgb(frame, matrix: tuple[int, ...] | None, ground: str) -> np.ndarray:
    """uint8 [H, W, 3], turned as the display matrix says.

    Args:
        frame: as decoded, or out of a graph.
        matrix: of MPEG-4: a point (x, y) is shown at (a x + c y, b x + d y); None leaves it.
        ground: colour under what is transparent.
    """
    untagged = frame.colorspace == UNTAGGED and not frame.format.is_rgb
    # Players take untagged HD for BT.709 and all else for BT.601 (mpv's limits).
    hd = untagged and (frame.width >= 1280 or frame.height > 576)
    source = {"src_colorspace": "ITU709"} if hd else {}
    if any(part.is_alpha for part in frame.format.components):
        rgba = frame.to_ndarray(format="rgba", **source)
        picture = on(ground, need("PIL.Image").fromarray(rgba))
    else:
        picture = frame.to_ndarray(format="rgb24", **source)
    if matrix is None:
        return picture
    a, b, _, c, d = matrix[:5]
    if abs(b) > abs(a):
        a, d = c, b
        picture = picture.transpose(1, 0, 2)
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
