"""The sound of a clip beside its edited frames: copied, or recoded where mp4 does not take it."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from tvkernels.video._files import need, url
from tvkernels.video._filters import ready

log = logging.getLogger(__name__)

# Decoders of what players read in an mp4. FFmpeg writes PCM and Vorbis there too, few play them.
COPIED = ("aac", "ac3", "alac", "eac3", "flac", "libopus", "mp3", "mp3float", "opus")
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
AAC_LAYOUTS = ("mono", "stereo", "3.0", "4.0", "5.0", "5.1")  # by channels


@dataclass(frozen=True)
class Audio:
    """What is heard while the frames of a `Video` are shown.

    Attributes:
        path: file that holds it.
        stream: its number there.
        start, end: seconds in the time of the file.
    """

    path: Path
    stream: int
    start: Fraction
    end: Fraction


@contextmanager
def opened(audio: Audio | None) -> Iterator[tuple[object, list] | None]:
    """A stream as template for mp4 and its packets, which begin at 0; None where there is none.

    What cannot be read or written is said and left out, because the frames are worth more.
    """
    with ExitStack() as files:
        try:
            found = None if audio is None else _found(audio, files)
        except (need("av").FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            log.warning("the sound of %s is left out: %s", audio.path, reason)
            found = None
        yield found


def _found(audio: Audio, files: ExitStack) -> tuple[object, list] | None:
    av = need("av")
    container = files.enter_context(av.open(url(audio.path)))
    stream = container.streams[audio.stream]
    if stream.codec_context.name not in COPIED:
        file = _recoded(container, stream, audio)
        container = files.enter_context(av.open(file))
        stream, audio = container.streams.audio[0], _from_zero(audio)
    packets = _cut(container, stream, audio)
    if not packets:
        log.warning("%s has no sound beside the frames taken", audio.path)
        return None
    with av.open(io.BytesIO(), "w", format="mp4") as trial:  # what fails should fail here
        trial.mux(on_track(packets, trial.add_stream_from_template(stream)))
    return stream, packets


def _from_zero(audio: Audio) -> Audio:
    return Audio(audio.path, 0, Fraction(0), audio.end - audio.start)


def _cut(container, stream, audio: Audio) -> list:
    tick = Fraction(stream.time_base)
    shift, packets = round(audio.start / tick), []
    for packet, _ in _whole(container, stream):
        if packet.pts is None:
            continue
        if packet.pts * tick >= audio.end:
            break
        # The packet before the first one too: a decoder needs it for the overlap, and the file's
        # edit list keeps it silent.
        if (packet.pts + 2 * (packet.duration or 0)) * tick > audio.start:
            packet.pts, packet.dts = packet.pts - shift, packet.pts - shift
            packets.append(packet)
    return packets


def _recoded(container, stream, audio: Audio) -> io.BytesIO:
    """An mp4 in memory with the span as AAC, which begins at 0."""
    av, file = need("av"), io.BytesIO()
    graph = av.filter.Graph()
    nodes = [
        graph.add_abuffer(template=stream),
        graph.add("atrim", f"start={float(audio.start):.6f}:end={float(audio.end):.6f}"),
        graph.add("asetpts", f"PTS-({float(audio.start):.6f}/TB)"),
        graph.add("abuffersink"),
    ]
    graph.link_nodes(*nodes).configure()
    with av.open(file, "w", format="mp4") as out:
        rate = stream.rate if stream.rate in AAC_RATES else 48000
        track = out.add_stream("aac", rate=rate, layout=_layout(stream))
        for frame in _heard(container, stream, graph):
            out.mux(track.encode(frame))
        out.mux(track.encode(None))
    file.seek(0)
    return file


def _layout(stream) -> str:
    return AAC_LAYOUTS[min(stream.channels, len(AAC_LAYOUTS)) - 1]


def _heard(container, stream, graph) -> Iterator:
    with suppress(need("av").EOFError):  # the graph has all that it trims to
        for _, frames in _whole(container, stream):
            for frame in frames:
                graph.push(frame)
                yield from ready(graph)
        graph.push(None)
    yield from ready(graph)


def _whole(container, stream) -> Iterator[tuple[object, list]]:
    """Packets that can be decoded, and their frames. Broken ones are left out and said."""
    broken = 0
    for packet in container.demux(stream):
        try:
            yield packet, packet.decode()
        except need("av").InvalidDataError:
            broken += 1
    if broken:
        log.warning("%s: %d broken packets of its sound are left out", container.name, broken)


def on_track(packets: list, track) -> list:
    """The packets, which now belong to a stream of an output."""
    for packet in packets:
        packet.stream = track
    return packets
