"""The command `tvk`."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

import tvkernels
from tvkernels import BackendError
from tvkernels._console import UNEXPECTED, console, say
from tvkernels.benchmarks.commands import bench
from tvkernels.benchmarks.profiling.command import profile_command
from tvkernels.benchmarks.report.publish import report
from tvkernels.config import ConfigError
from tvkernels.devices import DeviceError, memory_advice
from tvkernels.edit_command import edit_command
from tvkernels.pipelines import METHODS
from tvkernels.pipelines.checks import ModelError
from tvkernels.video import VideoError

BAD_INPUT, INTERRUPTED = 2, 130
OF_DIFFUSERS = ("diffusers", "transformers", "accelerate", "safetensors")
EXPECTED = (
    ConfigError, DeviceError, ModelError, VideoError, BackendError, ImportError, OSError,
    torch.OutOfMemoryError,
)  # fmt: skip

app = typer.Typer(
    help="Edit video with Stable Diffusion 1.x: lean pipelines on fused attention kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")
app.command("edit")(edit_command)
app.command("report")(report)
app.command("profile")(profile_command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"tvk {tvkernels.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of whatever goes wrong.")
    ] = False,
) -> None:
    pass


@app.command("atlas")
def atlas_command(
    clip: Annotated[Path, typer.Argument(help="The source: a video file or a folder of images.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder.")],
    frames: Annotated[int | None, typer.Option(help="Frames to take. (default: all)")] = None,
    start: Annotated[int, typer.Option(help="First frame to take, from 0.")] = 0,
    stride: Annotated[int, typer.Option(help="Take every n-th frame.")] = 1,
    size: Annotated[
        int | None, typer.Option(help="Pixels of the shorter side. (default: the clip's)")
    ] = None,
    mask: Annotated[
        list[Path] | None,
        typer.Option(
            help="Image, video or folder, bright where the object is; repeat it for several "
            "foreground layers, the front one first. (default: what moves)"
        ),
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Foreground layers without masks.")] = 1,
    steps: Annotated[
        int | None,
        typer.Option(min=0, help="Of the training. (default: every pixel is seen 40 times)"),
    ] = None,
    points: Annotated[
        int | None, typer.Option(min=1, help="Pixels in each step. (default: a 32nd of all)")
    ] = None,
    flow: Annotated[str, typer.Option(help="dis or farneback.")] = "dis",
    seed: Annotated[int, typer.Option(min=0, help="Of everything drawn.")] = 0,
) -> None:
    """Take a clip apart into layers, each one picture that can be edited by hand.

    `tvk edit CLIP --atlas DIR/background.png -o OUT.mp4` renders the clip from an edited one.
    """
    from tvkernels.atlas import AtlasSettings
    from tvkernels.atlas.commands import Cut, make_atlas

    if mask and layers > 1:
        raise ConfigError("give either --layers or a --mask for each of them")
    settings = AtlasSettings(steps=steps, points=points, layers=layers, flow=flow)
    make_atlas(clip, output, Cut(start, stride, frames, size), mask or (), settings, seed, say)


@app.command("export")
def export_command(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A folder; the UNet goes to its unet/.")
    ],
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = "ei2",
    kind: Annotated[str, typer.Option("--format", help="onnx, tensorrt or aoti.")] = "onnx",
    model: Annotated[
        str, typer.Option(help="A Stable Diffusion 1.x directory, a hub name, or embedded.")
    ] = "embedded",
    frames: Annotated[
        int | None, typer.Option(help="Frames per clip, fixed in the file. (default: method's)")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Pixels of the square picture. (default: the model's)")
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp16 or fp32.")] = "fp32",
    opset: Annotated[
        int, typer.Option(help="18 to 25; from 23 on one node for each attention.")
    ] = 23,
    arch: Annotated[
        list[str] | None, typer.Option(help="Of TensorRT, sm_89 and the like; repeat it.")
    ] = None,
    weights: Annotated[str, typer.Option(help="Of TensorRT: kept, refit or stripped.")] = "kept",
    timing_cache: Annotated[
        Path | None, typer.Option(help="Of TensorRT: a file, read and written.")
    ] = None,
    fixed_size: Annotated[
        bool, typer.Option("--fixed-size", help="Height and width do not change.")
    ] = False,
    projected_text: Annotated[
        bool,
        typer.Option("--projected-text", help="The text comes as every layer's keys and values."),
    ] = False,
    plugins: Annotated[
        bool,
        typer.Option("--plugins", help="Of TensorRT: attention by our own kernels. Unproven."),
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Compare what was written with eager PyTorch.")
    ] = False,
) -> None:
    """Write a method's UNet as ONNX, TensorRT engines or compiled code, for other programs to run.

    The exit status is 1 where --check finds an error beyond its budget.
    """
    from tvkernels.export import ExportSettings, export

    settings = ExportSettings(
        output, method, kind, model, frames, size, dtype, opset, tuple(arch or ()), weights,
        timing_cache, not fixed_size, projected_text, plugins,
    )  # fmt: skip
    if not export(settings, check, say):
        raise typer.Exit(UNEXPECTED)


@app.command()
def methods() -> None:
    """List the editing methods and their numbers."""
    from tvkernels.pipelines import pipeline_class

    table = Table("method", "frames", "tuning", "DDIM steps", "guidance", "source")
    for name in METHODS:
        own = pipeline_class(name).settings
        tuning = f"{own.tune_steps} steps at {own.learning_rate:g}" if own.tune_steps else "none"
        table.add_row(
            name, str(own.frames), tuning, str(own.steps), f"{own.guidance:g}", own.recipe.source
        )
    console().print(table)


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show versions, devices, and for every op and backend: runs, or all the reasons why not."""
    from tvkernels.info import main as show

    show(["--json"] if as_json else [])


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder.")] = Path("out/demo"),
    clips: Annotated[int, typer.Option(min=1, help="Clips of the shapes world.")] = 3,
    every: Annotated[bool, typer.Option("--all", help="Every method, instead of three.")] = False,
) -> None:
    """Edit clips with known answers by several methods, and measure the results."""
    from tvkernels.demo.run import QUICK, run

    run(output, clips, console(), say, tuple(METHODS) if every else QUICK)


@app.command()
def kernels(
    arch: Annotated[
        list[str] | None, typer.Option(help="sm_90 and the like, repeated. (default: all)")
    ] = None,
    op: Annotated[list[str] | None, typer.Option(help="Repeat it. (default: all)")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float16, bfloat16, float32. (default: all)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the table as Markdown.")
    ] = None,
) -> None:
    """Compile every shipped kernel for GPUs that need not be here, and judge the code.

    The exit status is 1 where a kernel spills, exceeds shared memory, lacks its matrix
    instructions or meets a known hazard of the compiler.
    """
    from tvkernels.testing import kernels

    if output is not None and not output.parent.is_dir():
        raise ConfigError(f"no folder {output.parent}: make it, or name another")
    try:
        rows = kernels.report(
            op,
            arch or tuple(kernels.SHARED_LIMITS),
            dtypes=dtype or tuple(kernels.DTYPES),
            say=lambda text: print(text, file=sys.stderr),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if output is not None:
        output.write_text(kernels.markdown(rows), encoding="utf-8")
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        for line in kernels.lines(rows):
            print(line)
    if any(row["faults"] for row in rows):
        raise typer.Exit(UNEXPECTED)


class _Warnings(logging.Handler):
    """Shows each of them once: what is told before the work is found again in it."""

    def __init__(self):
        super().__init__()
        self.shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = f"tvk: {record.levelname.lower()}: {record.getMessage()}"
        if line not in self.shown:
            print(line, file=sys.stderr)
        self.shown.add(line)


def _fail(text: str, status: int) -> int:
    line = "; ".join(part.strip() for part in text.splitlines() if part.strip())
    print(f"tvk: {line}", file=sys.stderr)
    return status


def main(arguments: list[str] | None = None) -> int:
    """Runs `tvk`; the exit status is 2 for bad input, 1 for a defect, 130 for Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    # Wherever it stands: it is added to the end of a line that has just failed.
    arguments = [argument for argument in arguments if argument != "--debug"]
    logger, handler = logging.getLogger("tvkernels"), _Warnings()
    logger.addHandler(handler)
    try:
        with memory_advice():
            status = app(arguments, prog_name="tvk", standalone_mode=False)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except Exception as error:
        if debug:
            raise
        return _explain(error)
    finally:
        logger.removeHandler(handler)
    if status == INTERRUPTED:
        return _fail("interrupted: what was finished is kept, nothing is half-written", status)
    return status or 0


def _explain(error: Exception) -> int:
    # Typer's own errors carry this method; their base class has moved between its versions.
    if hasattr(error, "format_message"):
        if not error.format_message():
            return BAD_INPUT  # called without a command: the help was shown
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "tvk"
        return _fail(f"{error.format_message()} See `{command} --help`.", BAD_INPUT)
    if isinstance(error, ModuleNotFoundError) and error.name in OF_DIFFUSERS:
        advice = f"{error.name} is not installed: pip install 'tvkernels[diffusers]'"
        return _fail(advice, BAD_INPUT)
    if isinstance(error, EXPECTED):
        return _fail(str(error) or type(error).__name__, BAD_INPUT)
    kind = type(error).__name__
    return _fail(f"{kind}: {error} (a defect, not your input: --debug shows where)", UNEXPECTED)


if __name__ == "__main__":
    sys.exit(main())
