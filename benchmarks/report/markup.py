"""Pieces of the report's page: tables, figures with their rows, players, raw rows."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from tvkernels.benchmarks.report import charts, tables
from tvkernels.benchmarks.report.figures import Figure
from tvkernels.benchmarks.report.tables import Cell, Results, Table
from tvkernels.benchmarks.stored import SOURCES, distinct, flat

TYPES = {".png": "image/png", ".mp4": "video/mp4", ".gif": "image/gif", ".webp": "image/webp"}
PAIRED = ("ablation", "systems")
VARIANTS = "tvk bench quality --first N --scenes M --ablation"
SAYS = {
    "pipelines": "Whole edits on SD-1.x shapes against the reference implementations",
    "ops": "The ops on a GPU, against every rival installed and the device's limit",
    "scaling": "Time and memory against the number of frames",
    "memory": "What Stable Diffusion 1.5 holds, by accounting",
    "native": "The C++ kernels",
    "runtimes": "Runtimes",
    "edits": "Whole edits under a runtime",
    "quality": "Quality",
    "atlas": "Atlases",
    "demo": "The demo",
}


@dataclass(frozen=True)
class Media:
    """Pictures and clips to show, by `tvk demo`.

    Attributes:
        sheets: (caption, file).
        scenes: each with its clips by who made them.
        device: where they were made.
    """

    sheets: Sequence[tuple[str, Path]] = ()
    scenes: Sequence[Scene] = ()
    device: str = ""


@dataclass(frozen=True)
class Scene:
    """A clip's source, truth and edits: name -> (file, what is said below it)."""

    source: str
    target: str
    clips: dict[str, tuple[Path, str]] = field(default_factory=dict)


def scenes(folder: Path) -> list[Scene]:
    """The clips of a folder that `tvk demo` wrote; none without its report.json."""
    if not (folder / "report.json").is_file():
        return []
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    first = next(iter(report["methods"].values()))["clips"]
    found = []
    for index, clip in enumerate(first):
        clips = {name: (folder / f"clip{index}-{name}.mp4", "") for name in ("source", "truth")}
        for method in tables.SHOWN:
            if method in report["methods"]:
                share = report["methods"][method]["clips"][index]["accuracy"]
                path = folder / f"clip{index}-{method}.mp4"
                clips[method] = (path, f"{100 * share:.0f} % on target")
        found.append(Scene(clip["source"], clip["target"], clips))
    return found


def device(folder: Path) -> str:
    """Where the clips of such a folder were made."""
    report = folder / "report.json"
    return json.loads(report.read_text(encoding="utf-8"))["device"] if report.is_file() else ""


def section(name: str, title: str, body: str) -> str:
    """A part of the page under its heading."""
    return f'<section><h2 id="{name}">{title}</h2>\n{body}</section>\n'


def cards(figures: Sequence[Figure], source: str) -> str:
    """Charts side by side, each with its legend and where its rows come from."""
    if not figures:
        return ""
    drawn = "".join(
        f"<figure><figcaption>{escape(f.chart.title)}<small>{escape(f.chart.description)}</small>"
        f"</figcaption>{charts.legend(f.chart)}{charts.svg(f.chart, f'{source}-{_slug(f)}-{n}')}"
        f"{_provenance(f.rows)}</figure>\n"
        for n, f in enumerate(figures)
    )
    return f'<div class="charts">{drawn}</div>'


def _slug(figure: Figure) -> str:
    return re.sub(r"\W+", "-", figure.chart.title.lower()).strip("-")


def table(name: str, results: Results, folded: str = "") -> str:
    """A table; with `folded`, below a line of that text which opens it."""
    found = tables.TABLES[name](results)
    source = "quality" if name in PAIRED else name
    if not found.rows or not results[source]:
        return absent(source)
    body = _grid(found) + _provenance(found.used, VARIANTS if name in PAIRED else "")
    if not folded:
        return body
    return f"<details><summary><small>{folded}</small></summary>{body}</details>"


def _grid(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in table.head)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in table.rows)
    return (
        f'<div class="table" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{rows}</tbody></table></div>"
    )


def _cell(cell: Cell | str) -> str:
    if isinstance(cell, str):
        return f"<td>{escape(cell)}</td>"
    text = escape(cell.text)
    return f'<td><a href="#{cell.ref}">{text}</a></td>' if cell.ref else f"<td>{text}</td>"


def _provenance(rows: Sequence[dict], command: str = "") -> str:
    if not rows:
        return ""
    name = rows[0]["id"].rpartition("-")[0]
    commits = distinct(rows, "commit")
    dates = sorted(distinct(rows, "date", lambda text: text[:10]))
    facts = [
        f'<a href="#{rows[0]["id"]}">{len(rows)} row{"s" * (len(rows) > 1)}</a>',
        f"<code>{escape(command or SOURCES[name].command)}</code>",
        escape("; ".join(distinct(rows, "device"))),
        f"commit {', '.join(commits)}" if commits else "",
        " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "",
    ]
    return f'<p class="source">{" · ".join(filter(None, facts))}</p>'


def absent(name: str) -> str:
    """That a source has no rows, and what makes them."""
    return none(SAYS[name], SOURCES[name].command)


def none(what: str, command: str = "tvk demo --all") -> str:
    """That something was not measured, and what does it."""
    return (
        f'<p class="absent"><strong>Not measured:</strong> {escape(what[0].lower() + what[1:])}. '
        f"<code>{escape(command)}</code> makes the rows.</p>"
    )


def untimed(rows: Sequence[dict], time: str, names: Sequence[str]) -> str:
    """What has rows without a time, with the reasons, each once."""
    lines = dict.fromkeys(
        f"{', '.join(row[name] for name in names)}: {row['status']}: {row['reason']}"
        for row in rows
        if row[time] is None
    )
    if not lines:
        return ""
    said = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return (
        f"<details><summary><small>Not timed, and why</small></summary><ul>{said}</ul></details>"
    )


def players(media: Media) -> str:
    """Every scene's clips side by side."""
    body = "<p><button data-play hidden>Play all clips</button></p>"
    for scene in media.scenes:
        body += f"<h3>{escape(scene.source)} → {escape(scene.target)}</h3>"
        body += '<div class="players">'
        for name, (path, said) in scene.clips.items():
            body += (
                f'<div><video controls loop muted playsinline preload="auto" '
                f'aria-label="{escape(f"{name}: {scene.target}")}" src="{_data(path)}"></video>'
                f"{escape(name)}<small>{escape(said)}</small></div>\n"
            )
        body += "</div>"
    return body + f'<p class="source"><code>tvk demo --all</code> · {escape(media.device)}</p>'


def sheet(caption: str, path: Path) -> str:
    """A picture below a line which opens it."""
    return (
        f"<details><summary>{escape(caption)}</summary>"
        f'<div class="sheet" tabindex="0"><img alt="{escape(caption)}" src="{_data(path)}"></div>'
        "</details>"
    )


def _data(path: Path) -> str:
    return f"data:{TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def raw(name: str, rows: Sequence[dict]) -> str:
    """A source's rows: what they share above, the rest as a table."""
    source = SOURCES[name]
    file = "demo.json" if name == "demo" else f"{name}.jsonl"
    title = f"<code>{file}</code> <small>{escape(source.title)}, "
    if not rows:
        return f"<details><summary>{title}not measured</small></summary>{absent(name)}</details>"
    lines = [flat(row) for row in rows]
    keys = list(dict.fromkeys(key for row in lines for key in row if key != "id"))
    values = {key: [_plain(row.get(key)) for row in lines] for key in keys}
    shared = {key: own[0] for key, own in values.items() if len(set(own)) == 1 and len(own) > 1}
    columns = [key for key in keys if key not in shared]
    head = "".join(f'<th scope="col">{escape(key)}</th>' for key in ("row", *columns))
    body = "".join(
        f'<tr id="{row["id"]}"><td>{row["id"]}</td>'
        f"{''.join(f'<td>{escape(values[key][index])}</td>' for key in columns)}</tr>\n"
        for index, row in enumerate(lines)
    )
    same = ", ".join(f"{key} {value}" for key, value in shared.items() if value)
    return (
        f"<details><summary>{title}{len(rows)} rows</small></summary>"
        f'<p class="source"><code>{escape(source.command)}</code>'
        f"{f' · in all rows: {escape(same)}' if same else ''}</p>"
        f'<div class="table raw" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{body}</tbody></table></div></details>\n"
    )


def _plain(value) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value)
