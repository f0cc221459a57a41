"""`tvk bench metrics`: an edited clip by V2VBench's metrics and the papers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tvkernels._console import console, say
from tvkernels.video import VideoError, read_video
from tvkernels.video.metrics import METRICS, ROLES, Measurement, MetricError, Models


def metrics_command(
    clip: Annotated[Path, typer.Argument(help="The edit: a video file or a folder of images.")],
    source: Annotated[
        Path | None, typer.Option(help="What was edited, fitted to the edit's size.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What the edit shall show.")] = None,
    source_prompt: Annotated[str | None, typer.Option(help="What the source shows.")] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(METRICS)}; repeat it. (default: all that can be taken)"),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="role=folder, file or hub name, in place of the published weights; repeat it. "
            f"Roles: {', '.join(ROLES)}."
        ),
    ] = None,
    start: Annotated[
        int | None, typer.Option(help="First frame of the source that was edited, from 0.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Every so-manieth frame of the source was edited.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1. (default: the GPU if there is one)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure an edited clip by V2VBench's metrics and the papers'.

    Without --metric, those that lack something are shown with what they lack; one that is asked
    for and cannot be taken is an error.
    """
    from tvkernels.devices import pick_device

    _quiet()
    frames = read_video(clip, multiple=1).frames
    measurement = Measurement(
        frames, source=None if source is None else _source(source, frames, start, stride),
        prompt=prompt, source_prompt=source_prompt,
        models=Models(_models(model or []), str(pick_device(device or "auto"))),
    )  # fmt: skip
    for name in metric or []:
        measurement.check(name)
    values, lacks = {}, {}
    for name in metric or METRICS:
        try:
            values[name] = measurement(name)
        except (MetricError, ImportError) as error:
            if metric:
                raise
            lacks[name] = str(error)
    if as_json:
        say(json.dumps({"clip": str(clip), "metrics": values, "lacks": lacks}, indent=2))
    else:
        _show(values, lacks)


def _source(path: Path, edit, start: int | None, stride: int | None):
    """The frames that were edited: those that --start and --stride name, else all there are."""
    told = start is not None or stride is not None
    frames = read_video(
        path, start=start or 0, stride=stride or 1, frames=len(edit) if told else None,
        size=edit.shape[1:3], multiple=1,
    ).frames  # fmt: skip
    if len(frames) != len(edit):
        raise VideoError(
            f"the edit has {len(edit)} frames, {path} has {len(frames)}: name those that were "
            "edited by --start and --stride"
        )
    return frames


def _models(given: list[str]) -> dict[str, str]:
    for item in given:
        if "=" not in item:
            raise MetricError(f"--model takes role=name, such as clip=FOLDER, not {item!r}")
    return dict(item.split("=", 1) for item in given)


def _show(values: dict[str, float], lacks: dict[str, str]) -> None:
    table = Table()
    for title in ("metric", "value", "scale", "better", "source"):
        table.add_column(title, justify="right" if title == "value" else "left")
    for name, value in values.items():
        about = METRICS[name]
        better = "higher" if about.higher else "lower"
        table.add_row(name, f"{value + 0:.4f}", about.scale, better, about.source)
    if values:
        console().print(table)
    for reason in dict.fromkeys(lacks.values()):
        names = ", ".join(name for name in lacks if lacks[name] == reason)
        say(reason if reason.startswith(names) else f"{names}: {reason}")


def _quiet() -> None:
    """Libraries' bars and advice are off, as in `tvk edit`."""
    try:
        import transformers
    except ImportError:
        return
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
