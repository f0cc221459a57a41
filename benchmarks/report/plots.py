"""The report's charts as PNG files, with matplotlib."""

from __future__ import annotations

import hashlib
import importlib
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from tvkernels.benchmarks.report.charts import Bars, Curves, Dots, axis_of, number
from tvkernels.benchmarks.report.figures import all_figures
from tvkernels.benchmarks.report.tables import Results

MISSING = "matplotlib is not installed (pip install 'tvkernels[bench]'): no plots"
COLORS = ("#0b6fb8", "#b4530a", "#2b8a57", "#8a4fa3", "#a58307", "#c2335f", "#3d7f8c", "#6b6f76")
MARKERS = "osD^v"
INK, PALE = "#1d2024", "#646b74"


def write(results: Results, folder: Path, say: Callable[[str], None]) -> list[Path]:
    """A PNG for each kind of figure that has rows, such as speed.png; none without matplotlib."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        say(MISSING)
        return []
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    written = []
    for name, figures in all_figures(results).items():
        if figures:
            written.append(folder / f"{name}.png")
            _draw([figure.chart for figure in figures], written[-1], pyplot)
    return written


def content(charts: Sequence[Dots | Bars | Curves]) -> str:
    """What a picture of these charts shows, as a digest that is kept in it."""
    # Six digits: sums may end otherwise on another CPU.
    text = re.sub(
        r"-?\d+\.\d+(e[+-]?\d+)?", lambda found: f"{float(found[0]):.6g}", repr([*charts])
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _draw(charts: Sequence[Dots | Bars | Curves], path: Path, pyplot) -> None:
    columns = min(len(charts), 3)
    lines = -(-len(charts) // columns)
    lanes = max(len(getattr(chart, "lanes", ())) for chart in charts) or 8
    size = (4.6 * columns + 1.2, lines * (0.36 * lanes + 1.5))
    with pyplot.rc_context({"font.size": 9, "text.color": INK, "axes.edgecolor": PALE}):
        figure, axes = pyplot.subplots(
            lines, columns, figsize=size, squeeze=False, layout="constrained"
        )
        for axis, chart in zip(axes.flat, charts, strict=False):
            {Dots: _dots, Bars: _bars, Curves: _curves}[type(chart)](chart, axis)
            said = textwrap.wrap(chart.description, 62)
            axis.set_title(
                chart.title, fontsize=10, loc="left", weight="bold", pad=6 + 10 * len(said)
            )
            axis.annotate(
                "\n".join(said), (0, 1), (0, 4), "axes fraction", "offset points", fontsize=7.5,
                color=PALE, annotation_clip=False,
            )  # fmt: skip
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.tick_params(length=0, labelcolor=INK)
            axis.grid(axis="x", color="#e3e4e6", linewidth=0.8)
            axis.set_axisbelow(True)
        for axis in axes.flat[len(charts) :]:
            axis.axis("off")
        keys = axes.flat[0].get_legend_handles_labels()
        if len(keys[1]) > 1 and not isinstance(charts[0], Curves):
            figure.legend(*keys, loc="outside lower center", ncols=3 * columns, frameon=False)
        # Without the program's own version in it the same plot is the same file.
        figure.savefig(path, dpi=110, metadata={"Software": None, "Comment": content(charts)})
        pyplot.close(figure)


def _dots(chart: Dots, axis) -> None:
    for series, name in enumerate(chart.series):
        marks = [
            (row, m) for row, lane in enumerate(chart.lanes) for m in lane.marks
            if m.series == series
        ]  # fmt: skip
        x, y = [m.value for _, m in marks], [row for row, _ in marks]
        look = {"color": COLORS[series % len(COLORS)], "zorder": 3}
        if marks or chart.line is not None:
            axis.plot(x, y, MARKERS[series % len(MARKERS)], ms=5.5, label=name, **look)
        for row, m in marks:
            if m.low is not None:
                axis.plot([m.low, m.high], [row, row], lw=2.5, alpha=0.45, **look)
    values = [v for lane in chart.lanes for m in lane.marks for v in (m.value, m.low, m.high)]
    span = axis_of([*values, chart.line], chart.log)
    if chart.log:
        axis.set_xscale("log")
        axis.minorticks_off()
    axis.set_xlim(span.low, span.high)
    axis.set_xticks(span.ticks(), [number(t) + chart.unit for t in span.ticks()], fontsize=8)
    if chart.line is not None:
        axis.axvline(chart.line, color=PALE, linestyle="--", linewidth=1)
    _name(chart, axis)


def _bars(chart: Bars, axis) -> None:
    for series, name in enumerate(chart.series):
        values = [lane.marks[series].value for lane in chart.lanes]
        before = [sum(m.value for m in lane.marks[:series]) for lane in chart.lanes]
        axis.barh(range(len(values)), values, 0.5, before, color=COLORS[series], label=name)
    axis.set_xlabel(chart.unit)
    _name(chart, axis)


def _curves(chart: Curves, axis) -> None:
    for series, (name, points) in enumerate(zip(chart.series, chart.curves.values(), strict=True)):
        look = {"color": COLORS[series % len(COLORS)], "marker": MARKERS[series % len(MARKERS)]}
        axis.plot(*zip(*(p[:2] for p in points), strict=True), label=name, **look)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.minorticks_off()
    points = [p for curve in chart.curves.values() for p in curve]
    across = sorted({p[0] for p in points})
    axis.set_xticks(across, [number(x) for x in across])
    span = axis_of([p[1] for p in points], True)
    axis.set_ylim(span.low, span.high)
    axis.set_yticks(span.ticks(), [number(t) for t in span.ticks()])
    axis.set_xlabel(chart.across)
    axis.set_ylabel(chart.unit)
    axis.legend(frameon=False, fontsize=8)


def _name(chart: Dots | Bars, axis) -> None:
    axis.set_yticks(range(len(chart.lanes)), [lane.label for lane in chart.lanes])
    axis.set_ylim(len(chart.lanes) - 0.5, -0.5)
