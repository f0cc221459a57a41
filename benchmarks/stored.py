"""The stored results: which file holds what, the command that makes it, and its rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvkernels.benchmarks import RESULTS
from tvkernels.video import VideoError, check_output


@dataclass(frozen=True)
class Source:
    """A file of results.

    Attributes:
        title: what its rows are, in words.
        command: what appends to it.
        key: what tells one thing measured from another; a later row replaces an earlier one.
    """

    title: str
    command: str
    key: tuple[str, ...]


CLIP = ("device", "method", "model", "backend", "dtype", "frames", "size")
SOURCES = {
    "pipelines": Source(
        "whole edits, phase by phase",
        "tvk bench pipelines",
        (*CLIP, "phase", "provider", "runtime"),
    ),
    "memory": Source(
        "what Stable Diffusion 1.5 holds, by accounting",
        "tvk bench memory",
        ("method", "model", "frames", "size", "dtype"),
    ),
    "ops": Source(
        "ops against rivals and the limit",
        "tvk bench ops",
        ("device", "op", "case", "dtype", "backward", "provider", "form"),
    ),
    "native": Source(
        "native CPU kernels",
        "python -m tvkernels.benchmarks.ops.native",
        ("device", "op", "variant", "side", "channels"),
    ),
    "runtimes": Source(
        "one sampling step under every runtime",
        "python -m tvkernels.benchmarks.edits.runtimes",
        ("device", "method", "runtime", "frames", "size"),
    ),
    "edits": Source(
        "a whole edit under a runtime, cold and warm",
        "tvk edit wolf.mp4 --frames 8 --tune-steps 2 --steps 4 --runtime R",
        ("device", "method", "clip", "runtime", "start"),
    ),
    "quality": Source(
        "edits of held-out scenes against the exact truth",
        "tvk bench quality --first 20 --scenes 20",
        ("method", "scene", "settings"),
    ),
    "atlas": Source(
        "layered atlases", "python -m tvkernels.benchmarks.edits.atlas", ("device", "clip")
    ),
    "demo": Source("the demo's clips", "make demo", ("method", "source")),
}


def load(folder: Path = RESULTS) -> dict[str, list[dict]]:
    """Every source's rows in the order of its file, each with its "id", such as "native-12".

    Raises:
        ValueError: a line is not a row.
    """
    return {name: _read(folder, name) for name in SOURCES}


def kept(rows: Iterable[dict], path: Path) -> Iterator[dict]:
    """The rows, each appended to a file as soon as it is there.

    Raises:
        VideoError: the file cannot be written; asked before the first row is made.
    """
    check_output(path, (".jsonl",))
    for row in rows:
        append(path, row)
        yield row


def append(path: Path, row: dict) -> None:
    """One row more; raises as `kept`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise VideoError(f"cannot write {path}: {error.strerror}") from error


def newest(name: str, rows: Iterable[dict]) -> list[dict]:
    """The last row of each thing measured, in the order in which it was first measured."""
    found = {}
    for row in rows:
        found[json.dumps([row.get(key) for key in SOURCES[name].key])] = row
    return list(found.values())


def flat(row: dict, prefix: str = "") -> dict[str, Any]:
    """The row without nesting: {"seconds": {"load": 1}} becomes {"seconds.load": 1}."""
    found = {}
    for key, value in row.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def distinct(rows: Sequence[dict], key: str, form: Callable = str) -> list[str]:
    """What the rows hold there, each once."""
    return list(dict.fromkeys(form(row[key]) for row in rows if row.get(key)))


def _read(folder: Path, name: str) -> list[dict]:
    path = folder / ("demo.json" if name == "demo" else f"{name}.jsonl")
    if not path.is_file():
        return []
    if name == "demo":
        rows = _demo(json.loads(path.read_text(encoding="utf-8")))
    else:
        rows = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                raise ValueError(f"{path}, line {number}: not a row of results") from None
    return [{"id": f"{name}-{number}", **row} for number, row in enumerate(rows, 1)]


def _demo(report: dict) -> list[dict]:
    facts = {"device": report["device"], "versions": report["versions"]}
    return [
        {"method": method, **clip, "settings": entry["settings"], **facts}
        for method, entry in report["methods"].items()
        for clip in entry["clips"]
    ]
