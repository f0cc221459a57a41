"""`tvk profile`, and its tables on the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tvkernels._console import console, say
from tvkernels.pipelines import METHODS

ROWS = 15  # of each table; profile.json has all
WORK = ("ms", "share", "MB", "GFLOP", "limit, ms", "% of limit", "bound by")


def profile_command(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A folder, for trace.json.gz and profile.json.")
    ],
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = "ei2",
    phase: Annotated[
        list[str] | None,
        typer.Option(help="tune, invert, sample or decode; repeat it. (default: all)"),
    ] = None,
    model: Annotated[
        str, typer.Option(help="A Stable Diffusion 1.x directory, a hub name, or embedded.")
    ] = "embedded",
    frames: Annotated[
        int | None, typer.Option(min=1, help="Frames of the clip. (default: the method's)")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Pixels of the square picture. (default: the model's)"),
    ] = None,
    runtime: Annotated[
        str, typer.Option(help="What inversion and sampling run under, see `tvk info`.")
    ] = "eager",
    steps: Annotated[int, typer.Option(min=1, help="Of each phase.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show where a method's time goes, by op, layer and phase, and how far the limit is."""
    from tvkernels.benchmarks.profiling.profile import TABLES, TRACE, ProfileSettings, profile

    given = ProfileSettings(
        output, method, tuple(phase or ()), model, frames, size, runtime, steps
    )
    report = profile(given, (lambda text: None) if as_json else say)
    if as_json:
        print(json.dumps(report, indent=1))
        return
    for table in tables(report):
        console().print(table)
    if report["largest_gap"] is not None:
        say(gap(report["largest_gap"]))
    say(
        f"the profiled pass took {report['profiler_ratio']:.2f} times the timed one; "
        f"{1e3 * report['outside_s']:.0f} ms of it lie outside the phases"
    )
    if runtime != "eager":
        say(f"bytes and flops are those of eager; what {runtime} runs itself is outside ops")
    if report["device"].startswith("cpu"):
        say("on a cpu: shares and ratios mean something, times say little")
    say(f"wrote {output / TRACE} (for ui.perfetto.dev) and {TABLES}")


def tables(report: dict) -> list[Table]:
    """By phase, by op and by layer."""
    side, whole = report["size"], report["whole_s"]
    head = f"{report['method']}, {report['frames']} frames of {side} x {side}, {report['runtime']}"
    phases = Table("phase", "outside ops, ms", *WORK, title=f"{head}, {report['device']}")
    for row in report["phases"]:
        outside = f"{1e3 * (row['seconds'] - row['operators_s']):.2f}"
        phases.add_row(row["phase"], outside, *_cells(row, whole))
    found = [phases]
    for name in ("op", "layer"):
        rows = report[f"{name}s"]
        table = Table(name, "calls", *WORK, title=f"the first {ROWS} of {len(rows)} {name}s")
        for row in rows[:ROWS]:
            table.add_row(row[name], str(row["calls"]), *_cells(row, whole))
        found.append(table)
    return found


def gap(row: dict) -> str:
    """The largest distance from the limit in one line."""
    return (
        f"largest gap to the limit: {row['op']} in {row['phase']}, {1e3 * row['gap_s']:.2f} ms of "
        f"{1e3 * row['seconds']:.2f} over {row['calls']} calls "
        f"({row['percent_of_limit']:.1f} % of the limit, which {row['bound']} set), most of it in "
        f"{row['layer']}"
    )


def _cells(row: dict, whole: float) -> tuple[str, ...]:
    known = row["limit_s"] is not None
    return (
        f"{1e3 * row['seconds']:.2f}", f"{100 * row['seconds'] / whole:.1f} %",
        f"{row['bytes'] / 1e6:.1f}", f"{row['flops'] / 1e9:.2f}",
        f"{1e3 * row['limit_s']:.2f}" if known else "not known",
        f"{row['percent_of_limit']:.1f}" if row["percent_of_limit"] is not None else "",
        row["bound"] or "" if known else "",
    )  # fmt: skip
