"""`tvk report`: the page, the pictures and the README's tables from the stored results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tvkernels._console import say
from tvkernels.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "tvk report -o docs/report.html --readme"
# In a checkout. Beside them `--demo` takes what `tvk demo` wrote.
CLIPS = ROOT / "docs" / "clips"
SHEETS = {
    "Six methods on one clip": ROOT / "docs" / "methods.png",
    "Three methods on three clips": ROOT / "docs" / "demo.png",
}


def report(
    output: Annotated[Path, typer.Option("--output", "-o", help="OUT.html.")] = Path(
        "out/report.html"
    ),
    results: Annotated[
        Path | None,
        typer.Option(help="A folder of results. (default: the checkout's benchmarks/results)"),
    ] = None,
    demo: Annotated[
        Path | None,
        typer.Option(help="A folder that `tvk demo` wrote. (default: the checkout's docs/clips)"),
    ] = None,
    readme: Annotated[
        bool, typer.Option("--readme", help="Write the README's marked tables anew, too.")
    ] = False,
) -> None:
    """Make one HTML page, and PNG plots beside it, of everything that was measured.

    The page needs no network: pictures and clips are in it. The plots need matplotlib.
    """
    from tvkernels.benchmarks import RESULTS, stored
    from tvkernels.benchmarks.report import page, plots, tables
    from tvkernels.video import atomic_path, check_output

    folder = results or RESULTS
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}: name one with --results")
    check_output(output, (".html",))
    try:
        found = stored.load(folder)
        text = page.html(found, media(demo), COMMAND)
        with atomic_path(output) as temporary:
            temporary.write_text(text, encoding="utf-8")
        written = [output, *plots.write(found, output.parent, say)]
        if readme:
            path = ROOT / "README.md"
            text = tables.update(path.read_text(encoding="utf-8"), found)
            with atomic_path(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
            written.append(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    say(f"written: {', '.join(map(str, written))}")


def media(demo: Path | None = None):
    """The clips and sheets of a demo's folder, or of the checkout's docs.

    Raises:
        ValueError: the folder is none that `tvk demo` wrote.
    """
    from tvkernels.benchmarks.report.markup import Media, device, scenes

    if demo is None:
        sheets = [(caption, path) for caption, path in SHEETS.items() if path.is_file()]
        return Media(sheets, scenes(CLIPS), device(CLIPS))
    if not (demo / "report.json").is_file():
        raise ValueError(f"no report.json in {demo}: `tvk demo -o {demo}` makes it")
    sheet = demo / "contact_sheet.png"
    sheets = [("All clips", sheet)] if sheet.is_file() else []
    return Media(sheets, scenes(demo), device(demo))
