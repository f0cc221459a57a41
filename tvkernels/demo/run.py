"""What `tvk demo` does: clips with known answers, methods side by side, one table, one picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from rich.console import Console
from rich.table import Table

from tvkernels.demo import MODEL_DIR
from tvkernels.demo.measure import edit_scene
from tvkernels.demo.settings import method_numbers
from tvkernels.demo.world import Scene, edit_pair
from tvkernels.pipelines.loading import load_pipeline
from tvkernels.record import device_name, versions, write_json
from tvkernels.video import check_output, contact_sheet, read_video, write_video

QUICK = ("frame-by-frame", "tune-a-video", "ei2")
FPS = 8
SHEET_HEIGHT = 96

# What the papers claim: (method, the one it is compared with, column of `COLUMNS`).
CLAIMS = (
    ("ei2", "tune-a-video", "target accuracy"),
    ("ei2", "tune-a-video", "background PSNR"),
    ("tune-a-video", "frame-by-frame", "temporal error"),
    ("tune-a-video", "frame-by-frame", "target accuracy"),
    ("ei2", "frame-by-frame", "temporal error"),
    ("ei2", "frame-by-frame", "target accuracy"),
    ("tcve", "tune-a-video", "temporal error"),
    ("blended-diffusion", "frame-by-frame", "background PSNR"),
    ("stable-video", "tune-a-video", "temporal error"),
)
LESS_IS_BETTER = ("temporal error",)

# Column -> (key of a measure, format, factor).
COLUMNS = {
    "target accuracy": ("accuracy", "{:.0f} %", 100),
    "background PSNR": ("psnr", "{:.1f} dB", 1),
    "temporal error": ("temporal", "{:.4f}", 1),
    "preprocessing": ("preprocess_s", "{:.1f} s", 1),
    "edit": ("edit_s", "{:.1f} s", 1),
    "peak memory": ("peak_mib", "{:.0f} MiB", 1),
}


def run(
    folder: Path, clips: int, console: Console, say: Callable[[str], None],
    methods: Sequence[str] = QUICK,
) -> dict:  # fmt: skip
    """Edits held-out clips by several methods and measures the results.

    The clips are written as mp4 files and read back, so what is edited went through a codec.
    Nothing is cached. All methods run in this process, one after the other; peak memory is the
    process's resident set during the method's own edits (see `measure.PeakMemory`).

    Args:
        folder: gets the clips, contact_sheet.png and report.json.
        clips: how many.
        console: shows the table.
        say: shows one line.
        methods: names of `pipelines.METHODS`.
    Returns:
        What report.json holds: settings, measures of every clip, their means, the sentences.
    Raises:
        VideoError: the folder cannot be written.
    """
    check_output(folder / "report.json", (".json",))
    began = time.perf_counter()
    pairs = [edit_pair(i) for i in range(clips)]
    sources = [_write_and_read(folder, i, source) for i, (source, _) in enumerate(pairs)]
    rows: dict[int, list[tuple[str, np.ndarray]]] = {}
    for i, (source, target) in enumerate(pairs):
        truth = target.render().frames
        write_video(folder / f"clip{i}-truth.mp4", truth, FPS)
        rows[i] = [(f"source\n{source.caption}", sources[i]), (f"truth\n{target.caption}", truth)]
    report: dict = {"methods": {}, "versions": versions()}
    for method in methods:
        numbers, _ = method_numbers(method, embedded=True)
        pipe = load_pipeline(method, str(MODEL_DIR), settings=numbers)
        report["device"] = device_name(pipe.device)
        results = []
        for i, (source, target) in enumerate(pairs):
            edited = edit_scene(pipe, numbers, source, target, sources[i])
            write_video(folder / f"clip{i}-{method}.mp4", edited.frames, FPS)
            rows[i].append((f"{method}\n{_cell(edited.measures, 'target accuracy')} on target",
                            edited.frames))  # fmt: skip
            results.append(edited.measures)
            say(f"{method}, clip {i + 1} of {clips}: {source.caption} -> {target.caption}")
        report["methods"][method] = {
            "settings": {
                name: getattr(numbers, name)
                for name in ("tune_steps", "learning_rate", "steps", "guidance")
            },
            "clips": [
                {"source": s.caption, "target": t.caption, **measures}
                for (s, t), measures in zip(pairs, results, strict=True)
            ],
            "mean": mean(results),
        }
        del pipe
    means = {method: entry["mean"] for method, entry in report["methods"].items()}
    report["sentences"] = sentences(means)
    report["seconds"] = round(time.perf_counter() - began, 1)
    sheet = contact_sheet(
        [row for clip in rows.values() for row in clip],
        folder / "contact_sheet.png", height=SHEET_HEIGHT,
    )  # fmt: skip
    write_json(folder / "report.json", report)
    console.print(_table(means, clips))
    for sentence in report["sentences"]:
        say(sentence)
    say(f"{report['seconds']:.0f} s in all; look at {sheet} and the clips beside it")
    return report


def mean(results: Iterable[dict]) -> dict[str, float | None]:
    """Mean of each measure; None where one was not measured."""
    results = list(results)
    columns = {name: [result[name] for result in results] for name in results[0]}
    return {n: None if None in values else fmean(values) for n, values in columns.items()}


def sentences(means: dict[str, dict]) -> list[str]:
    """What the means say about the methods' claims, whichever way they fall."""
    return [_compare(means, *claim) for claim in CLAIMS if {*claim[:2]} <= means.keys()]


def _compare(means: dict[str, dict], one: str, other: str, column: str) -> str:
    key = COLUMNS[column][0]
    ours, theirs = means[one][key], means[other][key]
    won = ours < theirs if column in LESS_IS_BETTER else ours > theirs
    verdict = "ties with" if ours == theirs else "beats" if won else "LOSES to"
    values = f"{_cell(means[one], column)} against {_cell(means[other], column)}"
    return f"{column}: {one} {verdict} {other}, {values}"


def _write_and_read(folder: Path, index: int, scene: Scene) -> np.ndarray:
    path = folder / f"clip{index}-source.mp4"
    write_video(path, scene.render().frames, FPS)
    return read_video(path).frames


def _cell(measures: dict, column: str) -> str:
    key, form, factor = COLUMNS[column]
    value = measures[key]
    return "not measured" if value is None else form.format(value * factor)


def _table(means: dict[str, dict], clips: int) -> Table:
    table = Table(title=f"means of {clips} clips", title_justify="left")
    table.add_column("method")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for method, measures in means.items():
        table.add_row(method, *(_cell(measures, column) for column in COLUMNS))
    return table
