"""Edits of held-out scenes of the shapes world against the exact truth, with intervals.

Every method of `tvkernels.pipelines.METHODS` takes part, on the embedded model; a new one needs
its line there, and where its own numbers do not suit that model, one in `demo/settings.py`.
A row of the results is one scene edited by one method. Scene i changes the colour, the shape or
both for i = 0, 1, 2 modulo 3.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tvkernels.benchmarks import RESULTS
from tvkernels.benchmarks.machine import commit, today
from tvkernels.benchmarks.stored import append
from tvkernels.config import ConfigError
from tvkernels.demo import MODEL_DIR
from tvkernels.demo.measure import edit_scene
from tvkernels.demo.settings import method_numbers
from tvkernels.demo.world import edit_pair
from tvkernels.devices import DTYPES
from tvkernels.edit import NUMBERS
from tvkernels.fronts import FRONTS
from tvkernels.patterns import FramePattern
from tvkernels.pipelines import METHODS
from tvkernels.pipelines.cache import Cache
from tvkernels.pipelines.loading import load_pipeline
from tvkernels.recipes import ABLATIONS, RECIPES, Recipe
from tvkernels.record import device_name, versions
from tvkernels.video import check_output

ROWS = RESULTS / "quality.jsonl"
RESAMPLES = 10_000
OWN_FRAME = replace(RECIPES["blended-diffusion"], name="own-frame", pattern=FramePattern.own())

# Key of a measure -> (title, factor, digits).
MEASURES = {
    "accuracy": ("target %", 100, 1),
    "color": ("colour %", 100, 1),
    "shape": ("shape %", 100, 1),
    "psnr": ("backgr. dB", 1, 1),
    "temporal": ("temporal error\nx1000", 1000, 2),
    "object": ("object\nx1000", 1000, 2),
    "background": ("background\nx1000", 1000, 2),
    "iou": ("mask IoU", 1, 2),
    "preprocess_s": ("prepare s", 1, 1),
    "edit_s": ("edit s", 1, 1),
    "peak_mib": ("peak MiB", 1, 0),
}
LEFT = {"title_justify": "left"}
COMPARED = ("accuracy", "psnr", "temporal")

# Paired differences that are shown where both took part: the papers' claims, EI2's figures 4, 5.
PAIRS = (
    ("ei2", "tune-a-video"),
    ("tune-a-video", "frame-by-frame"),
    ("ei2", "frame-by-frame"),
    ("tcve", "tune-a-video"),
    *((name, "tune-a-video") for name in ABLATIONS),
    *((name, "tcve") for name in ABLATIONS if name.startswith("tcve-")),
    *((name, "ei2-sparse-causal") for name in ("ei2", "ei2-r4")),
    ("ei2-frame-norm", "tav-frame-norm"),
    *((name, "frame-by-frame") for name in ("tav-frame-norm", "ei2-frame-norm", "tcve-paper")),
    *(
        ("stable-video", f"stable-video-{name}")
        for name in ("sequential", "random", "fixed", "median")
    ),
    *(
        ("blended-diffusion", name)
        for name in (
            "frame-by-frame", "tune-a-video", "ei2", "blended-no-mask", "blended-true-mask",
            "blended-random-background", "blended-own-frame",
        )
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Entrant:
    """A method, or a recipe in place of its own, or other settings.

    Attributes:
        masked: what tells the edited region, see `edit_scene`.
        shared: varies the edit alone, so that what `fit` makes of a scene is kept between such
            entrants; its time is then not measured.
    """

    name: str
    method: str
    recipe: Recipe | None = None
    changes: dict = field(default_factory=dict)
    masked: str | None = None
    shared: bool = False


# BLD-AC's table II (no mask, the user's, that of the words) and its figures 2 and 3 (the
# background's noise, the frames that are read).
MASKED = tuple(
    Entrant(f"blended-{name}", "blended-diffusion", **other)
    for name, other in {
        "no-mask": {"changes": {"mask": "none"}},
        "true-mask": {"masked": "true"},
        "random-background": {"changes": {"background": "random"}, "masked": "words"},
        "own-frame": {"recipe": OWN_FRAME, "masked": "words"},
    }.items()
)
# StableVideo's figure 11 (other ways to edit key frames), and the median in place of eq. 7.
CARRIED = tuple(
    Entrant(f"stable-video-{name}", "stable-video", changes=change, shared=True)
    for name, change in {
        **{way: {"propagation": way} for way in ("sequential", "random", "fixed")},
        "median": {"aggregation": "median"},
    }.items()
)
VARIED = {"blended-diffusion": MASKED, "stable-video": CARRIED}


def run(
    scenes: Iterable[int],
    methods: list[str] | None = None,
    *,
    ablation: bool = False,
    output: Path | None = None,
    resume: bool = False,
    numbers: dict[str, int | float] | None = None,
    seed: int = 0,
    dtype: str = "fp32",
    console: Console | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict]:
    """Edits scenes by methods, appends a row for each to a JSONL file, and shows a table.

    Args:
        scenes: numbers of held-out scenes.
        methods: names of `METHODS`; none takes all, or with `ablation` those it varies.
        ablation: the variants of these methods take part too: `tvkernels.recipes.ABLATIONS` of
            their recipes, `VARIED` of their other settings.
        output: appended to; by default benchmarks/results/quality.jsonl.
        resume: rows of the same scene, method, model and settings that are there already are
            taken from it instead, whatever the commit.
        numbers: tune_steps, learning_rate, steps and guidance, in place of every method's.
        seed: of everything drawn.
        dtype: a name of `tvkernels.devices.DTYPES`; rows of other types than fp32 tell it among
            their settings.
        console: shows the table, if any.
        say: shows one line.
    Returns:
        The rows, by method, then scene.
    Raises:
        ConfigError: unknown method or dtype.
        VideoError: the file cannot be written.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    scenes, output = list(scenes), ROWS if output is None else output
    line_up = entrants(methods, ablation)
    check_output(output, (".jsonl",))
    kept = {_key(row): row for row in read_rows(output)} if resume else {}
    rows = []
    with tempfile.TemporaryDirectory(prefix="tvkernels-") as folder:
        for entrant in line_up:
            own, _ = method_numbers(entrant.method, embedded=True)
            own = replace(own, recipe=entrant.recipe or own.recipe, **entrant.changes)
            # A method that tunes nothing has no use for numbers of the tuning.
            idle = () if own.recipe.tuned else ("tune_steps", "learning_rate")
            own = replace(own, **{n: v for n, v in (numbers or {}).items() if n not in idle})
            settings = {name: getattr(own, name) for name in NUMBERS}
            settings |= {"seed": seed, "frames": 8, "model": _model_digest(), **_of_its_own(own)}
            settings |= {} if dtype == "fp32" else {"dtype": dtype}
            pipe = None
            for scene in scenes:
                row = {"scene": scene, "method": entrant.name, "settings": settings}
                if _key(row) in kept:
                    rows.append(kept[_key(row)])
                    continue
                if pipe is None:
                    pipe = load_pipeline(
                        entrant.method, str(MODEL_DIR), dtype=DTYPES[dtype], settings=own
                    )
                row |= _measure(pipe, own, scene, seed, entrant, Cache(folder))
                append(output, row)
                rows.append(row)
                say(f"{entrant.name}, scene {scene}: {_summary(row['measures'])}")
    if console is not None:
        show(rows, console)
        say(f"rows are in {output}")
    return rows


def entrants(methods: list[str] | None, ablation: bool) -> list[Entrant]:
    """Who takes part; see `run`."""
    unknown = [name for name in methods or [] if name not in METHODS]
    if unknown:
        raise ConfigError(f"unknown method {unknown[0]!r}: use one of {', '.join(METHODS)}")
    base = {recipe.source: name for name, recipe in RECIPES.items()}
    sources = {name: base[recipe.source] for name, recipe in ABLATIONS.items()}
    varied = [name for name in METHODS if name in {*sources.values(), *VARIED}]
    chosen = methods if methods is not None else varied if ablation else list(METHODS)
    told = {name: "words" for name, own in FRONTS.items() if "words" in own.takes}
    found = [Entrant(name, name, masked=told.get(name)) for name in dict.fromkeys(chosen)]
    if ablation:
        found += [Entrant(n, m, ABLATIONS[n]) for n, m in sources.items() if m in chosen]
        found += [entrant for name in chosen for entrant in VARIED.get(name, ())]
    return found


def read_rows(path: Path) -> list[dict]:
    """Rows of a results file, none if there is no file.

    Raises:
        ConfigError: a line is not a row.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            _key(row)
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{path}, line {number}: not a row of results") from None
        rows.append(row)
    return rows


def interval(values: Iterable[float], resamples: int = RESAMPLES) -> tuple[float, float, float]:
    """Mean and its 95 % interval, by the percentile bootstrap; same values, same interval."""
    data = np.asarray(list(values), np.float64)
    picks = np.random.default_rng(0).integers(len(data), size=(resamples, len(data)))
    low, high = np.percentile(data[picks].mean(1), [2.5, 97.5])
    return float(data.mean()), float(low), float(high)


def differences(rows: list[dict], one: str, other: str, measure: str) -> list[float]:
    """one - other on every scene that both edited."""
    by = {(row["method"], row["scene"]): row["measures"][measure] for row in rows}
    scenes = sorted({scene for _, scene in by})
    pairs = [(by.get((one, scene)), by.get((other, scene))) for scene in scenes]
    return [a - b for a, b in pairs if a is not None and b is not None]


def show(rows: list[dict], console: Console) -> None:
    """Means, 95 % intervals, and paired differences."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    count = len({row["scene"] for row in rows})
    table = Table(title=f"{count} scenes: mean [95 % interval]", show_lines=True, **LEFT)
    table.add_column("method")
    for title, *_ in MEASURES.values():
        table.add_column(title, justify="right")
    for method in methods:
        own = [row["measures"] for row in rows if row["method"] == method]
        table.add_row(method, *(_cell([m.get(name) for m in own], name) for name in MEASURES))
    console.print(table)
    compared = Table(title="paired differences [95 % interval]", show_lines=True, **LEFT)
    compared.add_column("")
    for name in COMPARED:
        compared.add_column(MEASURES[name][0], justify="right")
    for one, other in PAIRS:
        if one != other and one in methods and other in methods:
            cells = (_cell(differences(rows, one, other, n), n, "+") for n in COMPARED)
            compared.add_row(f"{one} - {other}", *cells)
    if compared.rows:
        console.print(compared)


def _measure(pipe, numbers, scene: int, seed: int, entrant: Entrant, fits: Cache) -> dict:
    source, target = edit_pair(scene)
    measures = edit_scene(
        pipe, numbers, source, target, seed=seed, masked=entrant.masked,
        cache=fits if entrant.shared else None,
    ).measures  # fmt: skip
    return {
        "recipe": repr(numbers.recipe),
        "source": source.caption,
        "target": target.caption,
        "measures": {n: None if v is None else round(v, 6) for n, v in measures.items()},
        "device": device_name(pipe.device),
        "versions": versions(),
        "commit": commit(),
        "date": today(),
    }


def _of_its_own(settings) -> dict:
    """What a method's settings hold beyond those of all methods."""
    from tvkernels.pipelines.one_shot import Settings

    common = {each.name for each in fields(Settings)}
    return {n: v for n, v in asdict(settings).items() if n not in common}


def _key(row: dict) -> str:
    return json.dumps([row["scene"], row["method"], row["settings"]], sort_keys=True)


def _model_digest() -> str:
    digest = hashlib.sha256()
    for file in sorted(MODEL_DIR.rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _summary(measures: dict) -> str:
    parts = (f"{' '.join(title.split())} {measures[name] * factor:.{digits}f}"
             for name, (title, factor, digits) in MEASURES.items()
             if name in COMPARED and measures[name] is not None)  # fmt: skip
    return ", ".join(parts)


def _cell(values: list, measure: str, sign: str = "") -> str:
    _, factor, digits = MEASURES[measure]
    if not values or None in values:
        return "not measured"
    mean, low, high = (v * factor for v in interval(values))
    text = f"{mean:{sign}.{digits}f}"
    if len(values) > 1:
        text += f"\n[{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"
    return text
