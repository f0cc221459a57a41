"""What the report draws: stored rows to charts, for the page and for the pictures alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import multimode

import torch

from tvkernels.benchmarks.edits.quality import MEASURES, interval
from tvkernels.benchmarks.edits.scaling import Fit, fit
from tvkernels.benchmarks.edits.steps import STEPS
from tvkernels.benchmarks.limits import Rates, limit
from tvkernels.benchmarks.ops.native import FRAMES, HEADS
from tvkernels.benchmarks.report.charts import Bars, Curves, Dots, Lane, Mark
from tvkernels.benchmarks.report.tables import LEVELS, NATIVE, SHOWN, Results
from tvkernels.benchmarks.stored import newest
from tvkernels.ops import specs

OWN = "ours"  # a provider of `tvk bench pipelines`
PLACE = ("device", "model", "backend", "dtype")
OURS = ("cuda", "triton", "native", "cpu")


@dataclass(frozen=True)
class Figure:
    """A chart and the rows that it was made from."""

    chart: Dots | Bars | Curves
    rows: Sequence[dict]


def pipelines(results: Results) -> list[Figure]:
    """Every method's time and memory beside its references', a chart a phase.

    Of several numbers of frames the commonest is drawn, the largest of those; a method without it
    has its own.
    """
    found = []
    for kind, rows in _grouped(_timed(results), (*PLACE, "size", "phase")).items():
        _, model, _, dtype, size, phase = kind
        names = sorted(dict.fromkeys(map(_who, rows)), key=lambda name: name != OWN)
        frames = max(multimode(row["frames"] for row in rows))
        times, sizes, used = {}, {}, []
        for (method,), own in _grouped(rows, ("method",)).items():
            count = frames if any(r["frames"] == frames for r in own) else own[0]["frames"]
            lane = method + f", {count} frame{'s' * (count > 1)}" * (count != frames)
            for row in (r for r in own if r["frames"] == count):
                series, ratio, used = names.index(_who(row)), row["ratio"], [*used, row]
                said = f"{ratio:.1f}" if series else _seconds(row["seconds"])
                mark = Mark(series, ratio, said, row["id"], row["ratio_low"], row["ratio_high"])
                times.setdefault(lane, []).append(mark)
                if row["peak_bytes"]:
                    held = row["peak_bytes"] / 2**20
                    mark = Mark(series, held, f"{held:,.0f}", row["id"])
                    sizes.setdefault(lane, []).append(mark)
        clip = f"{model}, {frames} frames of {size[1]} × {size[0]}, {dtype}"
        step = " of a step" * (phase in STEPS)
        for title, text, lanes, unit, line in (
            (f"Time{step}, {phase}", f"With ours as 1; {clip}", times, "×", 1),
            (f"Memory{step}, {phase}", f"Peak MiB beyond the inputs; {clip}", sizes, "", None),
        ):
            drawn = [Lane(name, marks) for name, marks in lanes.items()]
            found.append(Figure(Dots(title, text, names, drawn, unit, line=line), used))
    found.sort(key=lambda figure: figure.chart.line is None)  # times, then memory
    return [figure for figure in found if figure.chart.lanes]


def scaling(results: Results) -> list[Figure]:
    """Time and memory against frames, with the exponent of the power that fits best."""
    found = []
    for kind, rows in _grouped(_timed(results), (*PLACE, "method", "size", "phase")).items():
        _, model, _, dtype, method, size, phase = kind
        for name, quantity, unit, factor in (
            ("time", "seconds", "s", 1), ("memory", "peak_bytes", "MiB", 2**-20)
        ):  # fmt: skip
            curves = {}
            for (who,), own in _grouped(rows, (_who,)).items():
                points = {
                    r["frames"]: (r["frames"], (r[quantity] or 0) * factor, r["id"]) for r in own
                }
                points = sorted(points.values())
                if len(points) > 2 and all(y for _, y, _ in points):  # two fit any power
                    xs, ys, _ = zip(*points, strict=True)
                    curves[f"{who}, {_power(fit(xs, ys))}"] = points
            text = f"{model}, {size[1]} × {size[0]}, {dtype}, on logarithmic axes"
            chart = Curves(f"{method}, {phase}: {name}", text, curves, "frames", unit)
            found.append(Figure(chart, rows))
    found.sort(key=lambda figure: figure.chart.unit, reverse=True)  # times, then memory
    return [figure for figure in found if figure.chart.curves]


def _power(found: Fit) -> str:
    return f"∝ n^{found.exponent:.2f}" + (f" ± {found.error:.2f}" if found.error else "")


def speed(results: Results) -> list[Figure]:
    """The CPU kernels' times against the reference and composed PyTorch, a chart a level."""
    found = []
    for side, channels in LEVELS:
        rows, lanes = _at(results, side), []
        for row, name in rows:
            ratios = [row[f"{b}_s"] / row["native_s"] for b in ("native", "reference", "cpu")]
            marks = [Mark(i, x, f"{x:.1f}" if i else "", row["id"]) for i, x in enumerate(ratios)]
            lanes.append(Lane(name, marks))
        chart = Dots(
            f"{side} × {side}, {channels} channels", "Time, with the C++ kernel as 1",
            ("C++ kernel", "plain reference", "composed PyTorch"), lanes, "×", line=1,
        )  # fmt: skip
        found.append(Figure(chart, [row for row, _ in rows]))
    return [figure for figure in found if figure.rows]


def memory(results: Results) -> list[Figure]:
    """What a call of the CPU kernels holds beyond its inputs, at the largest level."""
    rows = [(r, name) for r, name in _at(results, LEVELS[0][0]) if "native_bytes" in r]
    lanes = []
    for row, name in rows:
        sizes = [row[f"{b}_bytes"] / 2**20 for b in ("native", "reference", "cpu")]
        texts = [f"{x:.0f}" if x >= 10 else f"{x:.2g}" for x in sizes]
        marks = zip(range(3), sizes, texts, strict=True)
        lanes.append(Lane(name, [Mark(i, max(x, 0.1), text, row["id"]) for i, x, text in marks]))
    chart = Dots(
        "Memory of a call, 64 × 64", "MiB held at a time beyond the inputs, exact",
        ("C++ kernel", "plain reference", "composed PyTorch"), lanes, " MiB",
    )  # fmt: skip
    return [Figure(chart, [row for row, _ in rows])] if rows else []


def share(results: Results) -> list[Figure]:
    """How near the CPU kernels come to the limit that the rates of their run allow."""
    lanes, used = {}, []
    for series, (side, _) in enumerate(LEVELS):
        for row, name in _at(results, side):
            if "flops" in row and (parameters := _case(row)):
                op = specs()[row["op"].partition(" ")[0]]
                rates = Rates(*(row[n] for n in ("copied_bytes", "flops", "exps", "l2_bytes")))
                least = limit(replace(op, cases={"": parameters}), "", torch.float32, rates)
                percent = 100 * least.seconds / row["native_s"]
                mark = Mark(series, percent, f"{percent:.0f}", row["id"])
                lanes.setdefault(name, []).append(mark)
                used.append(row)
    chart = Dots(
        "Share of the limit", "limit = max(bytes / copy rate, flops / matrix rate, exponentials / "
        "exponential rate), rates measured in the same run",
        [f"{side} × {side}" for side, _ in LEVELS],
        [Lane(name, marks) for name, marks in lanes.items()], " %", log=False,
    )  # fmt: skip
    return [Figure(chart, used)] if used else []


def ops(results: Results) -> list[Figure]:
    """Every provider's share of the limit, a chart for each device, op and dtype."""
    timed = (
        row for row in newest("ops", results["ops"])
        if row["median_s"] is not None and row["form"] == "as used"
    )  # fmt: skip
    found = []
    for kind, rows in _grouped(timed, ("device", "op", "dtype", "backward")).items():
        device, op, dtype, backward = kind
        names = list(dict.fromkeys(row["provider"] for row in rows))
        names.sort(key=lambda name: name not in OURS)
        lanes = {}
        for row in rows:
            best = row["provider"] in OURS
            text = f"{row['percent_of_limit']:.0f}" if best else ""
            mark = Mark(names.index(row["provider"]), row["percent_of_limit"], text, row["id"])
            lanes.setdefault(row["case"], []).append(mark)
        chart = Dots(
            f"{op}, {dtype}{', forward and backward' * backward}",
            f"Share of the limit on {device}", names,
            [Lane(case, marks) for case, marks in lanes.items()], " %", log=False,
        )  # fmt: skip
        found.append(Figure(chart, rows))
    return found


def runtimes(results: Results) -> list[Figure]:
    """A sampling step's speed against the reference of the same run, every run a mark."""
    lanes: dict[str, list[Mark]] = {}
    last = {row["id"] for row in newest("runtimes", results["runtimes"])}
    for row in results["runtimes"]:
        ratio, name = row["reference_ratio"], f"{row['method']}, {row['runtime']}"
        text = f"{ratio:.2f} ×, {row['step_s'] * 1e3:.0f} ms" if row["id"] in last else ""
        lanes.setdefault(name, []).append(Mark(0, ratio, text, row["id"]))
    chart = Dots(
        "Speed of a step", "Times the reference of the same run; a mark for every run, the newest "
        "in figures", ("step",),
        [Lane(name, marks) for name, marks in lanes.items() if "reference" not in name],
        "×", log=False, line=1,
    )  # fmt: skip
    return [Figure(chart, results["runtimes"])] if lanes else []


def edits(results: Results) -> list[Figure]:
    """Seconds of a whole edit, cold and warm, by phases."""
    rows = newest("edits", results["edits"])
    phases = list(dict.fromkeys(n for row in rows for n in row["seconds"] if n != "total"))
    lanes = []
    for row in rows:
        taken = [row["seconds"].get(name, 0.0) for name in phases]
        taken = list(enumerate([*taken, row["seconds"]["total"] - sum(taken)]))
        label = f"{row['runtime']}, {'first time' if row['start'] == 'cold' else 'from cache'}"
        lanes.append(Lane(label, [Mark(i, s, f"{s:.1f} s", row["id"]) for i, s in taken]))
    chart = Bars("A whole edit", "Seconds by phase, 8 frames", [*phases, "rest"], lanes, "s")
    return [Figure(chart, rows)] if rows else []


def quality(results: Results) -> list[Figure]:
    """Each measure's mean and 95 % interval by method."""
    rows = newest("quality", results["quality"])
    found = []
    for measure, (title, better) in {
        "accuracy": ("Target accuracy, %", "more is better"),
        "psnr": ("Background, dB", "more is better"),
        "temporal": ("Temporal error × 1000", "less is better"),
    }.items():
        lanes, used, factor = [], [], MEASURES[measure][1]
        for method in SHOWN:
            if own := [row for row in rows if row["method"] == method]:
                mean, low, high = (
                    v * factor for v in interval(row["measures"][measure] for row in own)
                )
                text = f"{mean:.1f} [{low:.1f}, {high:.1f}]"
                lanes.append(Lane(method, [Mark(0, mean, text, own[0]["id"], low, high)]))
                used += own
        text = f"Mean and 95 % bootstrap interval; {better}"
        found.append(Figure(Dots(title, text, ("",), lanes, log=False), used))
    return [figure for figure in found if figure.rows]


def _timed(results: Results) -> list[dict]:
    return [row for row in newest("pipelines", results["pipelines"]) if row["seconds"]]


def _who(row: dict) -> str:
    return row["provider"] if row["runtime"] == "eager" else f"{row['provider']}, {row['runtime']}"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{value * 1e3:.0f} ms"


def _grouped(rows: Iterable[dict], keys: Sequence[str | Callable]) -> dict[tuple, list[dict]]:
    """Rows by these of their values, or what a function makes of them, in order."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        values = (key(row) if callable(key) else row[key] for key in keys)
        key = tuple(tuple(v) if isinstance(v, list) else v for v in values)
        found.setdefault(key, []).append(row)
    return found


def _at(results: Results, side: int) -> list[tuple[dict, str]]:
    """The newest native rows of a level with their short names, in the tables' order."""
    rows = {
        (row["op"], row["variant"]): row
        for row in newest("native", results["native"])
        if row["side"] == side
    }
    return [(rows[key], short) for key, (_, short) in NATIVE.items() if key in rows]


def _case(row: dict) -> dict | None:
    """A native row as a case of its op's spec; None where no spec counts the whole call."""
    side, channels = row["side"], row["channels"]
    tokens = {"b": 1, "f": FRAMES, "n": side * side, "h": HEADS, "d": channels // HEADS}
    clip = {"shape": (1, FRAMES, channels, side, side), "groups": 32, "silu": True}
    return {
        "temporal_attention": tokens,
        "shift_restricted_temporal_attention": tokens | {"c": channels, "heads": HEADS},
        "token_map_attention": tokens | {"tokens": (2, 5), "length": 77},
        "clip_group_norm": clip,
        "guided_ddim_step": {
            "shape": (1, FRAMES, 4, side, side), "guided": True, "mask": None,
        },
    }.get(row["op"])  # fmt: skip


FIGURES = {
    "pipelines": pipelines,
    "scaling": scaling,
    "speed": speed,
    "memory": memory,
    "limit": share,
    "ops": ops,
    "runtimes": runtimes,
    "edits": edits,
    "quality": quality,
}


def all_figures(results: Results, names: Iterable[str] = FIGURES) -> dict[str, list[Figure]]:
    """Every figure by its name; none where nothing was measured."""
    return {name: FIGURES[name](results) for name in names}
