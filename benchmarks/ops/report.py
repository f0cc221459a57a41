"""Results of `tvk bench ops` as a table in Markdown and, with matplotlib, as a picture."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

KEY = ("device", "op", "case", "dtype", "backward", "provider", "form")
GROUP = ("device", "op", "dtype", "backward")
HEAD = (
    "case", "provider", "form", "median [20, 80 %]", "% of limit", "x reference", "peak MiB",
    "error / budget",
)  # fmt: skip
OURS = ("cuda", "triton", "cpu")
MISSING = "matplotlib is not installed (pip install 'tvkernels[bench]'): no picture"


def read(path: Path) -> list[dict]:
    """The newest row of every op, case, dtype, provider and form, by device.

    Raises:
        ValueError: no such file, or a line that is no row.
    """
    if not path.is_file():
        raise ValueError(f"no results in {path}: `tvk bench ops -o {path}` makes them")
    newest: dict[tuple, dict] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(text)
            newest[tuple(row[name] for name in KEY)] = row
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: not a row of `tvk bench ops`") from None
    return list(newest.values())


def write(
    source: Path, target: Path | None = None, say: Callable[[str], None] = lambda text: None
) -> list[Path]:
    """Writes the table, and beside it the picture where matplotlib is installed.

    Args:
        source: JSONL of `tvk bench ops`.
        target: ends in .md; the source's name with .md if None.
        say: shows one line: what was written, what is missing.
    Returns:
        The files written.
    Raises:
        ValueError: no rows to read.
        OSError: a file cannot be written.
    """
    rows = read(source)
    target = target or source.with_suffix(".md")
    written = [target]
    target.write_text(markdown(rows), encoding="utf-8")
    try:
        pyplot = _pyplot()
    except ImportError:
        say(MISSING)
    else:
        written.append(target.with_suffix(".png"))
        picture(rows, written[-1], pyplot)
    say(f"written: {', '.join(map(str, written))}")
    return written


def markdown(rows: Sequence[dict]) -> str:
    """A table for each device, op and dtype; below it what has no time, with the reason."""
    lines = ["# Ops against the device's limits", ""]
    lines += [
        "limit = max(bytes / copy rate, flops / matrix rate, exponentials / exponential rate),",
        "rates measured in the same run. The form `kernel` has its inputs laid out for it before",
        "the clock starts, `as used` starts from [B, F, N, H, D]. Every timed result was first",
        "checked against float64.",
    ]
    for group, own in grouped(rows, GROUP).items():
        device, op, dtype, backward = group
        what = "forward and backward" if backward else "forward"
        lines += ["", f"## {op}, {dtype}, {what}, on {device}", "", _provenance(own[-1])]
        if device.startswith("cpu"):
            lines += ["", "**Measured on a cpu: ratios mean something, times say little.**"]
        timed = [row for row in own if row["median_s"] is not None]
        if timed:
            lines += ["", _cells(HEAD), _cells(["---"] * len(HEAD))]
            lines += [_cells(_row(row)) for row in timed]
            lines += ["", *against_rivals(timed)]
        rest = grouped([r for r in own if r["median_s"] is None], ("provider", "status", "reason"))
        lines += ["", *(_absence(key, rows) for key, rows in rest.items())]
    return "\n".join(lines).rstrip() + "\n"


def against_rivals(timed: Sequence[dict]) -> list[str]:
    """For each case the fastest of ours against the fastest rival, both as used, none lossy."""
    lines = []
    for (case,), rows in grouped(timed, ("case",)).items():
        fair = [row for row in rows if row["form"] == "as used" and row["status"] == "timed"]
        fair.sort(key=lambda row: row["median_s"])
        ours = next((row for row in fair if row["provider"] in OURS), None)
        rival = next((row for row in fair if row["provider"] not in OURS), None)
        if ours and rival:
            ratio = rival["median_s"] / ours["median_s"]
            names = f"{ours['provider']} against {rival['provider']}"
            lines.append(f"- {case}: {names}, the best rival as used: {ratio:.2f} x its speed")
    return lines


def grouped(rows: Iterable[dict], names: Sequence[str]) -> dict[tuple, list[dict]]:
    """Rows by these of their values, in the order of the first of each."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def picture(rows: Sequence[dict], path: Path, pyplot) -> None:
    """Time against the limit, and peak memory, of every timed provider: a row for each group."""
    groups = grouped([r for r in rows if r["median_s"] is not None], GROUP)
    figure, axes = pyplot.subplots(
        max(len(groups), 1), 2, figsize=(13, 4.5 * max(len(groups), 1)), squeeze=False
    )
    for (left, right), (group, own) in zip(axes, groups.items(), strict=False):
        device, op, dtype, backward = group
        cases = list(dict.fromkeys(row["case"] for row in own))
        for (name, form), points in grouped(own, ("provider", "form")).items():
            x = [cases.index(row["case"]) for row in points]
            label = name if form == "as used" else f"{name}, {form}"
            style = "o" if form == "as used" else "x"
            left.plot(x, [row["median_s"] * 1e6 for row in points], style, label=label)
            right.plot(x, [row["peak_bytes"] / 2**20 for row in points], style, label=label)
        limits = {row["case"]: row["limit_s"] * 1e6 for row in own}
        left.plot(range(len(cases)), [limits[case] for case in cases], "k_", ms=24)
        left.set_title(f"{op}, {dtype}{', with backward' * backward}\n{device}", fontsize=9)
        left.set_ylabel("time, us (bar: limit)")
        right.set_ylabel("peak beyond the inputs, MiB")
        left.set_yscale("log")
        right.set_yscale("symlog", linthresh=0.1)
        for axis in (left, right):
            axis.set_xticks(range(len(cases)), cases, rotation=30, ha="right", fontsize=7)
        right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _pyplot():
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def _provenance(row: dict) -> str:
    names = ("driver", "torch", "triton", "ptxas", "commit", "date")
    text = ", ".join(f"{name} {row[name]}" for name in names if row[name])
    rates = row["rates"]
    if rates:
        text += (
            f"; rates: copy {rates['copied_bytes'] / 1e9:.0f} GB/s, "
            f"product {rates['flops'] / 1e12:.3g} TFLOP/s, {rates['exps'] / 1e12:.3g} T exp/s"
        )
        if rates["l2_bytes"]:
            text += f", L2 {rates['l2_bytes'] / 1e12:.3g} TB/s"
    if row["sm_clock_mhz"]:
        text += f"; SM clock {row['sm_clock_mhz']} MHz"
    return text + ("; UNSAFE ptxas in use" if row["unsafe_ptxas"] else "") + "."


def _row(row: dict) -> list[str]:
    low, middle, high = (_time(row[name]) for name in ("p20_s", "median_s", "p80_s"))
    ratio = row["vs_reference"]
    mark = "" if row["status"] == "timed" else f" ({row['status']})"
    return [
        row["case"],
        row["provider"] + mark,
        row["form"],
        f"{middle} [{low}, {high}]" + (" events" if row["timing"] == "events" else ""),
        f"{row['percent_of_limit']:.0f} ({row['bound']})",
        "" if ratio is None else f"{ratio:.2f}",
        f"{row['peak_bytes'] / 2**20:.1f}",
        f"{row['error']:.1e} / {row['budget']:.1e}" if row["error"] is not None else "",
    ]


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def _absence(key: tuple, rows: Sequence[dict]) -> str:
    provider, status, reason = key
    cases = ", ".join(dict.fromkeys(row["case"] for row in rows))
    return f"- {provider}: {status}: {reason} ({cases})"


def _cells(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
