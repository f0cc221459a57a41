"""`tvk bench`: one command for each thing that is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tvkernels._console import UNEXPECTED, console, say
from tvkernels.benchmarks.metrics_command import metrics_command
from tvkernels.config import ConfigError

bench = typer.Typer(help="Measure the methods.", no_args_is_help=True)
Methods = Annotated[list[str] | None, typer.Option(help="Repeat it for several. (default: all)")]
Appended = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Appended to. (default: benchmarks/results/)"),
]


@bench.command()
def quality(
    scenes: Annotated[int, typer.Option(min=1, help="Held-out scenes.")] = 4,
    first: Annotated[int, typer.Option(min=0, help="Number of the first one.")] = 0,
    method: Methods = None,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="Also the ablations of the methods' papers.")
    ] = False,
    output: Appended = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Skip what the output already holds.")
    ] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="DDIM steps.")] = None,
    tune_steps: Annotated[int | None, typer.Option(min=0, help="Steps of the tuning.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the tuning.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything drawn.")] = 0,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
) -> None:
    """Measure edits of held-out scenes against the exact truth, with confidence intervals."""
    from tvkernels.benchmarks.edits.quality import run

    numbers = {
        "steps": steps, "tune_steps": tune_steps, "learning_rate": learning_rate,
        "guidance": guidance,
    }  # fmt: skip
    run(
        range(first, first + scenes), method, ablation=ablation, output=output, resume=resume,
        numbers={name: value for name, value in numbers.items() if value is not None},
        seed=seed, dtype=dtype, console=console(), say=say,
    )  # fmt: skip


@bench.command()
def ops(
    op: Annotated[list[str] | None, typer.Option(help="Repeat it. (default: all)")] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(help="Repeat it. (default: real shapes; on a CPU small stand-ins for them)"),
    ] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(help="triton, reference, sdpa-flash and so on, repeated. (default: all)"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1. (default: the GPU if there is one)")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="Repeat it. (default: bfloat16, on a CPU float32)"),
    ] = None,
    backward: Annotated[
        bool, typer.Option("--backward", help="Forward and backward together.")
    ] = False,
    output: Appended = None,
) -> None:
    """Check and time the ops against everything else that can run them, and against the limit.

    The exit status is 1 where a result is wrong; a wrong one is not timed.
    """
    from tvkernels.benchmarks.ops import run as measure

    try:
        rows = measure.run(
            op, case, provider, device=device, dtypes=dtype, backward=backward, output=output,
            say=say,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if any(row["status"] == measure.WRONG for row in rows):
        raise typer.Exit(UNEXPECTED)


@bench.command()
def report(
    results: Annotated[
        Path | None, typer.Argument(help="JSONL of `tvk bench ops`. (default: where it writes)")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="OUT.md. (default: beside the results)"),
    ] = None,
) -> None:
    """Make the table and the picture of measured ops: time against the limit, and memory."""
    from tvkernels.benchmarks.ops import report as reports
    from tvkernels.benchmarks.ops.run import ROWS

    try:
        reports.write(results or ROWS, output, say)
    except ValueError as error:
        raise ConfigError(str(error)) from error


@bench.command()
def pipelines(
    method: Methods = None,
    frames: Annotated[
        list[int] | None, typer.Option(min=1, help="Of the clip, repeated. (default: 8)")
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(help="256 or 256x448 (height first), repeated. (default: the model's own)"),
    ] = None,
    phase: Annotated[
        list[str] | None,
        typer.Option(
            help="inversion, sampling and tuning, a step each, and whole: preprocessing, edit. "
            "(default: the steps)"
        ),
    ] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(help="ours, reference, reference-sdpa, repeated. (default: all)"),
    ] = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option(help="Of ours, repeated: eager, compile, aoti and so on. (default: eager)"),
    ] = None,
    model: Annotated[
        str,
        typer.Option(help="embedded, half-sd, sd15 (random weights), a directory or a hub name."),
    ] = "embedded",
    backend: Annotated[str, typer.Option(help="Of our attention ops.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="In a call. (default: 2; of whole phases the method's)"),
    ] = None,
    tune_steps: Annotated[
        int | None, typer.Option(min=0, help="Of whole preprocessing. (default: the method's)")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="Of timing, for each provider of a phase.")
    ] = 10.0,
    resident: Annotated[
        bool,
        typer.Option("--resident", help="Resident peaks too: a fresh process for each row."),
    ] = False,
    output: Appended = None,
) -> None:
    """Time the phases of whole edits beside their plain references, with memory and operations.

    The exit status is 1 where a result is wrong; a wrong one is not timed.
    """
    from tvkernels.benchmarks.edits import pipelines as measure
    from tvkernels.benchmarks.edits.steps import PROVIDERS, STEPS
    from tvkernels.benchmarks.report import pipeline_tables

    rows = measure.run(
        method, frames or (8,), [_height_width(text) for text in size or ()], phase or STEPS,
        provider or PROVIDERS, runtime or ("eager",),
        settings=measure.Settings(
            model, backend, dtype, steps, tune_steps, seconds, resident
        ),
        output=output, say=say,
    )  # fmt: skip
    pipeline_tables.show(rows, console())
    if any(row["status"] == measure.WRONG for row in rows):
        raise typer.Exit(UNEXPECTED)


def _height_width(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdigit() for side in sides):
        raise ConfigError(f"size {text!r}: write 256, or 256x448 with the height first")
    return int(sides[0]), int(sides[-1])


@bench.command()
def memory(
    method: Methods = None,
    frames: Annotated[
        list[int] | None, typer.Option(min=1, help="Of the clip, repeated. (default: 8, 24)")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float32, bfloat16, float16, repeated. (default: the first two)"),
    ] = None,
    checkpointing: Annotated[bool, typer.Option(help="Tuning under it too.")] = True,
    output: Appended = None,
) -> None:
    """Account for what Stable Diffusion 1.5 holds at 512 x 512, and for the longest clips."""
    from tvkernels.benchmarks.edits import footprint

    rows = footprint.run(
        method, frames or (8, 24), dtype or ("float32", "bfloat16"), checkpointing=checkpointing,
        output=output, say=say,
    )  # fmt: skip
    footprint.show(rows, console())


bench.command("metrics")(metrics_command)
