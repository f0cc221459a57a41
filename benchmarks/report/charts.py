"""Charts as inline SVG: no library, no script, every mark a link to the row it shows.

Places across are in percent and places down in pixels, so that a chart fits any width and its text
keeps its size. Colours are the page's: class `s0` is ours, `s1` and after are what it is compared
with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

LEFT, RIGHT = 4.0, 96.0  # percent of the width between which values lie
LANE, LABEL, MARK = 42, 14, 29  # pixels: height of a lane, its label's baseline, its marks' middle
AXIS = 22
CURVES = 250  # pixels: height of a plane
SHAPES = (
    '<circle r="5"/>',
    '<path d="M-4.5-4.5h9v9h-9z"/>',
    '<path d="M0-6 6 0 0 6-6 0z"/>',
    '<path d="M0-5.5 5.5 4.5h-11z"/>',
    '<path d="M0 5.5 5.5-4.5h-11z"/>',
)


@dataclass(frozen=True)
class Mark:
    """A value of one series, its interval if it has one, and the row that holds it."""

    series: int
    value: float
    text: str
    ref: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Lane:
    """One thing measured: a label over its marks."""

    label: str
    marks: Sequence[Mark]


@dataclass(frozen=True)
class Dots:
    """Marks on lanes over one axis, logarithmic or from the lowest value on.

    Attributes:
        series: names; one alone is not named.
        unit: stands behind the axis' numbers.
        line: a value that is drawn through all lanes.
    """

    title: str
    description: str
    series: Sequence[str]
    lanes: Sequence[Lane]
    unit: str = ""
    log: bool = True
    line: float | None = None


@dataclass(frozen=True)
class Bars:
    """Lanes of parts that add up: a series for each part."""

    title: str
    description: str
    series: Sequence[str]
    lanes: Sequence[Lane]
    unit: str = ""


@dataclass(frozen=True)
class Curves:
    """Points (x, y, row's id) of several series on two logarithmic axes, joined by lines."""

    title: str
    description: str
    curves: dict[str, Sequence[tuple[float, float, str]]]
    across: str
    unit: str

    @property
    def series(self) -> list[str]:
        """Names of the curves."""
        return list(self.curves)


@dataclass(frozen=True)
class Axis:
    """Values to places between `start` and `end`, and the ticks between them."""

    low: float
    high: float
    log: bool
    start: float = LEFT
    end: float = RIGHT

    def __call__(self, value: float) -> float:
        one, low, high = (math.log(v) if self.log else v for v in (value, self.low, self.high))
        place = (one - low) / (high - low)
        return self.start + min(max(place, 0), 1) * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values inside; at most `most`."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 2, 5), (1, 3), (1,)):
                found = [s * 10.0**p for p in powers for s in steps]
                found = [v for v in found if self.low <= v <= self.high]
                if len(found) <= most:
                    return found
            return found[:: -(-len(found) // most)]
        step = 10 ** math.floor(math.log10((self.high - self.low) / 2))
        while (self.high - self.low) / step > most:
            step *= 2 if (self.high - self.low) / step <= 2 * most else 5
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [number * step for number in range(first, last + 1)]


def axis_of(values: Iterable[float], log: bool, zero: bool = False) -> Axis:
    """An axis with a little room beside the lowest and highest value."""
    values = [v for v in values if v is not None and (v > 0 or not log)]
    low, high = min(values, default=1), max(values, default=10)
    if log:
        room = max((high / low) ** 0.05, 1.15)
        return Axis(low / room, high * room, True)
    room = 0.04 * (high - low) or 1.0
    return Axis(0 if zero else low - room, high + room, False)


def svg(chart: Dots | Bars | Curves, name: str) -> str:
    """The chart; `name` makes its ids unique on a page."""
    draw = {Dots: _dots, Bars: _bars, Curves: _curves}[type(chart)]
    body, height = draw(chart)
    return (
        f'<svg role="group" aria-labelledby="{name}-t {name}-d" width="100%" height="{height}">'
        f'<title id="{name}-t">{escape(chart.title)}</title>'
        f'<desc id="{name}-d">{escape(chart.description)}</desc>{body}</svg>'
    )


def legend(chart: Dots | Bars | Curves) -> str:
    """Names of the series beside their marks; nothing for a single one without a fit."""
    names = list(chart.series)
    if len(names) < 2 and not isinstance(chart, Curves):
        return ""
    square = SHAPES[1] if isinstance(chart, Bars) else None
    keys = (
        f'<span><svg width="14" height="12"><g class="s{i}" transform="translate(7 6)">'
        f"{square or shape(i)}</g></svg>{escape(name)}</span>"
        for i, name in enumerate(names)
    )
    return f'<p class="legend">{" ".join(keys)}</p>'


def shape(series: int) -> str:
    return SHAPES[series % len(SHAPES)]


def number(value: float) -> str:
    """Short, without a needless fraction: 0.5, 12, 2k."""
    if abs(value) >= 1000:
        return f"{value / 1000:.3g}k"
    return f"{value:.3g}"


def _dots(chart: Dots) -> tuple[str, int]:
    marks = [mark for lane in chart.lanes for mark in lane.marks]
    values = [v for m in marks for v in (m.value, m.low, m.high)] + [chart.line]
    axis = axis_of(values, chart.log)
    parts = [_grid(axis, len(chart.lanes) * LANE, chart.unit)]
    if chart.line is not None:
        parts.append(_upright(axis(chart.line), len(chart.lanes) * LANE, "line"))
    for index, lane in enumerate(chart.lanes):
        top = index * LANE
        said = '<tspan class="pale"> · </tspan>'.join(
            f'<tspan class="s{m.series}">{escape(m.text)}</tspan>' for m in lane.marks if m.text
        )
        parts.append(_heading(lane.label, said, top))
        # The first series, ours, lies on top.
        parts += [_mark(m, axis, top + MARK, _tip(chart, lane, m)) for m in lane.marks[::-1]]
    return "".join(parts), len(chart.lanes) * LANE + AXIS


def _bars(chart: Bars) -> tuple[str, int]:
    sums = [sum(m.value for m in lane.marks) for lane in chart.lanes]
    axis = Axis(0, max(sums, default=1), False, 0, 100)
    parts = []
    for index, (lane, total) in enumerate(zip(chart.lanes, sums, strict=True)):
        top, at = index * LANE, 0.0
        parts.append(_heading(lane.label, escape(f"{total:.1f} {chart.unit}"), top))
        for m in lane.marks:
            x, width = axis(at), axis(at + m.value) - axis(at)
            at += m.value
            parts.append(
                f'<a href="#{m.ref}"><title>{escape(_tip(chart, lane, m))}</title>'
                f'<rect class="s{m.series}" x="{x:.2f}%" y="{top + MARK - 9}" '
                f'width="{width:.2f}%" height="14"/></a>'
            )
    return "".join(parts), len(chart.lanes) * LANE


def _curves(chart: Curves) -> tuple[str, int]:
    points = [point for curve in chart.curves.values() for point in curve]
    across = axis_of([x for x, *_ in points], True)
    across = Axis(across.low, across.high, True, 12, RIGHT)
    down = axis_of([y for _, y, _ in points], True)
    down = Axis(down.low, down.high, True, CURVES, 8)
    parts = []
    for tick in down.ticks():
        y = round(down(tick))
        parts.append(f'<line class="grid" x1="12%" x2="100%" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text class="tick" x="10.5%" y="{y + 4}" text-anchor="end">{number(tick)}</text>'
        )
    for x in sorted({x for x, *_ in points}):
        parts.append(_tick(across(x), CURVES, number(x)))
    for series, (name, curve) in enumerate(chart.curves.items()):
        ends = [(across(x), down(y)) for x, y, _ in curve]
        for (x1, y1), (x2, y2) in pairwise(ends):
            parts.append(
                f'<line class="curve s{series}" x1="{x1:.2f}%" y1="{y1:.1f}" '
                f'x2="{x2:.2f}%" y2="{y2:.1f}"/>'
            )
        for (x, y), (n, value, ref) in zip(ends, curve, strict=True):
            tip = f"{name}: {number(value)} {chart.unit} at {number(n)} {chart.across}"
            parts.append(_point(x, y, series, ref, tip))
    parts.append(
        f'<text class="tick" x="100%" y="{CURVES + 34}" text-anchor="end">{chart.across}</text>'
        f'<text class="tick" x="0" y="{CURVES + 34}">{chart.unit}</text>'
    )
    return "".join(parts), CURVES + 40


def _heading(label: str, said: str, top: int) -> str:
    return (
        f'<text x="0" y="{top + LABEL}">{escape(label)}</text>'
        f'<text class="said" x="100%" y="{top + LABEL}" text-anchor="end">{said}</text>'
    )


def _grid(axis: Axis, height: int, unit: str) -> str:
    ticks = axis.ticks()
    return "".join(
        _upright(axis(t), height, "grid") + _tick(axis(t), height, number(t) + unit) for t in ticks
    )


def _upright(x: float, height: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x:.2f}%" x2="{x:.2f}%" y1="20" y2="{height}"/>'


def _tick(x: float, height: float, text: str) -> str:
    return f'<text class="tick" x="{x:.2f}%" y="{height + 15}" text-anchor="middle">{text}</text>'


def _mark(mark: Mark, axis: Axis, y: int, tip: str) -> str:
    reach = ""
    if mark.low is not None:
        reach = (
            f'<line class="reach s{mark.series}" x1="{axis(mark.low):.2f}%" '
            f'x2="{axis(mark.high):.2f}%" y1="{y}" y2="{y}"/>'
        )
    return reach + _point(axis(mark.value), y, mark.series, mark.ref, tip)


def _point(x: float, y: float, series: int, ref: str, tip: str) -> str:
    return (
        f'<a href="#{ref}"><title>{escape(tip)}</title><svg class="mark s{series}" x="{x:.2f}%" '
        f'y="{y:.0f}">{shape(series)}</svg></a>'
    )


def _tip(chart: Dots | Bars, lane: Lane, mark: Mark) -> str:
    name = f", {chart.series[mark.series]}" if len(chart.series) > 1 else ""
    return f"{lane.label}{name}: {mark.text or number(mark.value)}"
