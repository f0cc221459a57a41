"""Tables of `tvk bench pipelines`: each phase, whole edits as steps add up, and the curves."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tvkernels.benchmarks.edits.scaling import Curve, curves

BASE = ("ours", "eager")
LEFT = {"title_justify": "left"}
SAME = ("method", "frames", "size", "provider", "runtime")


def show(rows: Sequence[dict], console: Console) -> None:
    """All that rows of one run have to say."""
    console.print(_phases(rows))
    for table in (_edits(rows), _curves(curves(rows))):
        if table.rows:
            console.print(table)


def _phases(rows: Sequence[dict]) -> Table:
    table = _table(
        "a step of each phase; ratios to ours, taken in turns [95 % interval]",
        ("method", "clip", "phase", "provider"),
        ("seconds", "x ours", "peak MiB", "x ours", "GFLOP", "GB moved", "UNet calls", "error"),
    )
    ours = {_place(row): row for row in rows if (row["provider"], row["runtime"]) == BASE}
    for row in rows:
        cells = [row["method"], _clip(row), row["phase"], _provider(row)]
        if row["seconds"] is None:
            table.add_row(*cells, row["status"], row["reason"])
            continue
        base = ours.get(_place(row), {})
        table.add_row(
            *cells, f"{row['seconds']:.3g}",
            f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]",
            _number(row["peak_bytes"], 2**20, 1),
            _number(row["peak_bytes"], base.get("peak_bytes") or 0, 2),
            _number(row["flops"], 1e9, 1), _number(row["bytes"], 1e9, 2),
            _number(row["unet_calls"], 1, 0), f"{row['error']:.0e}",
        )  # fmt: skip
    return table


def _edits(rows: Sequence[dict]) -> Table:
    """Seconds of preprocessing and edit: the method's number of steps times a step's."""
    table = _table(
        "a clip's seconds, by the method's own numbers of steps, without the VAE",
        ("method", "clip", "provider"), ("preprocessing", "edit"),
    )  # fmt: skip
    groups: dict[tuple, dict] = {}
    for row in rows:
        if row["seconds"] is not None:
            key = tuple(str(row[name]) for name in SAME)
            groups.setdefault(key, {})[row["phase"]] = row
    for phases in groups.values():
        took = {name: row["seconds"] * row["method_steps"] for name, row in phases.items()}
        row = next(iter(phases.values()))
        before = took.get("inversion")
        if before is not None:
            before += took.get("tuning", 0.0)
        cells = (took.get("preprocessing", before), took.get("edit", took.get("sampling")))
        table.add_row(
            row["method"], _clip(row), _provider(row), *(_number(cell, 1, 1) for cell in cells)
        )
    return table


def _curves(found: Sequence[Curve]) -> Table:
    table = _table(
        "growth: exponent +- standard error (root mean square of the points' distances)",
        ("method", "provider", "phase", "of", "with"), ("exponent",),
    )  # fmt: skip
    for curve in found:
        fit = curve.fit
        error = "" if fit.error is None else f" +- {fit.error:.2f} ({fit.residual:.1%})"
        table.add_row(
            curve.of["method"], _provider(curve.of), curve.of["phase"],
            curve.quantity.removesuffix("_bytes"), curve.against, f"{fit.exponent:.2f}{error}",
        )  # fmt: skip
    return table


def _table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, **LEFT)
    for name in names:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _place(row: dict) -> tuple:
    return (row["method"], row["frames"], *row["size"], row["phase"])


def _clip(row: dict) -> str:
    return f"{row['frames']} of {row['size'][1]} x {row['size'][0]}"


def _provider(row: dict) -> str:
    return row["provider"] if row["runtime"] == "eager" else f"{row['provider']}, {row['runtime']}"


def _number(value: float | None, unit: float, digits: int) -> str:
    return "" if value is None or not unit else f"{value / unit:.{digits}f}"
