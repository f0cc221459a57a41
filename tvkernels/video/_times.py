"""When frames are shown: their constant rate, or that they have none."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from statistics import median

# Matroska's times are whole milliseconds, also where a clip is packed into another container.
MILLISECOND = Fraction(1, 1000)
# A folder of images has no frame rate; 8 is what Tune-A-Video shows its clips at.
FOLDER_FPS = Fraction(8)
MOST_COPIES = 4  # of a frame on the mean, where a clip stands still


def rate_of(container, stream) -> tuple[Fraction, bool, int]:
    """Frames a second, whether every frame lies where this rate has it, and frames at this rate.

    Reads all packets of the stream, and leaves the container at its end, unless the header
    tells: mp4 and mov list the time of every frame, if they are not fragmented. It is the time of
    decoding, so a pause right before the last frames, which are decoded out of order, is not seen.
    """
    told = Fraction(stream.average_rate or 0)
    listed = "mp4" in container.format.name.split(",") and stream.frames
    if told and told == stream.base_rate and listed:
        return told, True, stream.frames
    tick = Fraction(stream.time_base or MILLISECOND)
    packets = [(p.dts if p.pts is None else p.pts, p.duration) for p in container.demux(stream)]
    marks = sorted((at, duration or 0) for at, duration in packets if at is not None)
    if not marks:
        return told or FOLDER_FPS, True, 0
    times = [at * tick for at, _ in marks]
    gaps = [after - before for before, after in pairwise(times) if after > before]
    usual = median(gaps) if gaps else 0
    length = times[-1] - times[0] + (marks[-1][1] * tick or usual)
    mean = len(times) / length if length else told or FOLDER_FPS
    whole = Fraction(max(1, round(mean)))
    # A GIF's delays are whole hundredths: 8 frames a second are 12, 13, 12, ... and told as 8.33.
    gif = stream.codec_context.name == "gif"
    first = (whole,) if gif else (told, Fraction(stream.guessed_rate or 0))
    rounding = max(tick, MILLISECOND)
    for rate in filter(None, (*first, whole, mean)):
        late = [at - index / rate for index, at in enumerate(times)]
        if max(late) - min(late) <= rounding and abs(len(times) / rate - length) <= 2 / rate:
            return rate, True, len(times)
    rate = _nominal(gaps, usual, mean)
    return rate, False, round(length * rate)


def _nominal(gaps: list[Fraction], usual: Fraction, mean: Fraction) -> Fraction:
    """The rate of most frames, so that pauses repeat frames and motion loses none."""
    near = [gap for gap in gaps if usual / 2 < gap < usual * 3 / 2]
    rate = len(near) / sum(near) if near else mean
    rate = mean if rate > MOST_COPIES * mean else rate
    whole = round(rate)
    return Fraction(whole) if abs(rate - whole) < rate / 100 else rate.limit_denominator(1001)
