"""Tables of the stored results, the same in the README and in the report.

In the README a table stands between `<!-- report: NAME -->` and `<!-- end -->`; `tvk report
--readme` writes it anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from tvkernels.benchmarks.edits.quality import MEASURES, differences, interval
from tvkernels.benchmarks.stored import newest

Results = dict[str, list[dict]]

# (op, variant) of results/native.jsonl -> its name in full and in short.
NATIVE = {
    ("frame_attention", "fine-coarse, r = 2"): (
        "fine-coarse frame attention, r = 2", "frame attention, fine-coarse",
    ),
    ("frame_attention", "[0; f - 1]"): ("frame attention [0; f - 1]",) * 2,
    ("frame_attention gradients", "fine-coarse, r = 2"): (
        "gradients of fine-coarse frame attention", "fine-coarse, gradients",
    ),
    ("frame_attention gradients", "[0; f - 1]"): (
        "gradients of frame attention [0; f - 1]", "[0; f - 1], gradients",
    ),
    ("temporal_attention", "q, k, v apart"): ("temporal attention",) * 2,
    ("temporal_attention gradients", "q, k, v apart"): (
        "gradients of temporal attention", "temporal, gradients",
    ),
    ("temporal_attention", "slices of one"): (
        "temporal attention on slices of one projection", "temporal, slices of one projection",
    ),
    ("temporal_attention with projections", "with projections"): (
        "temporal attention with its four projections", "temporal, with projections",
    ),
    ("shift_restricted_temporal_attention", ""): (
        "shift-restricted temporal attention", "shift-restricted temporal",
    ),
    ("shift_restricted_temporal_attention gradients", ""): (
        "gradients of shift-restricted attention", "shift-restricted, gradients",
    ),
    ("token_map_attention", ""): (
        "cross-attention with token maps", "cross-attention, token maps",
    ),
    ("clip_group_norm", "SiLU"): ("clip group norm + SiLU",) * 2,
    ("clip_group_norm", "SiLU, channels last"): (
        "the same, channels last", "group norm, channels last",
    ),
    ("clip_group_norm gradients", "SiLU"): (
        "gradients of clip group norm + SiLU", "group norm, gradients",
    ),
    ("temporal_conv", "norm, SiLU"): ("norm, SiLU, temporal convolution", "temporal convolution"),
    ("temporal_conv gradients", "norm, SiLU"): (
        "gradients of temporal convolution", "temporal convolution, gradients",
    ),
    ("guided_ddim_step", ""): ("guided DDIM step",) * 2,
}  # fmt: skip
LEVELS = ((64, 320), (32, 640), (16, 1280))
ABLATION = {
    ("tav-frame-norm", "tune-a-video"): "Tune-A-Video, norms per frame",
    ("ei2-frame-norm", "ei2"): "EI2, norms per frame",
    ("ei2-sparse-causal", "ei2"): ("EI2, sparse-causal frames in place of fine-coarse (figure 5)"),
    ("ei2-r4", "ei2"): "EI2, r = 4 in place of 2 (figure 5)",
    ("tav-layer-norm-plain", "tune-a-video"): (
        "Tune-A-Video, layer norm without rescaling (figure 4)"
    ),
    ("tav-no-norm", "tune-a-video"): "Tune-A-Video, no norm (figure 4)",
    ("tav-instance-norm", "tune-a-video"): "Tune-A-Video, instance norm (figure 4)",
    ("tav-centering", "tune-a-video"): "Tune-A-Video, centering (figure 4)",
}
SYSTEMS = {
    ("blended-diffusion", "frame-by-frame"): "blended diffusion - frame by frame",
    ("blended-diffusion", "ei2"): "blended diffusion - EI2",
    ("blended-diffusion", "blended-true-mask"): (
        "blended diffusion - the same, given the true mask"
    ),
    ("blended-diffusion", "blended-random-background"): "blended diffusion - random background",
    ("blended-diffusion", "blended-no-mask"): "blended diffusion - no mask",
    ("blended-diffusion", "blended-own-frame"): "blended diffusion - own frame alone",
    ("tcve", "tune-a-video"): "TCVE - Tune-A-Video",
    ("tcve", "tcve-paper"): "TCVE - the form that the paper writes",
    ("tcve-paper", "frame-by-frame"): "that form - frame by frame",
    ("tcve", "tcve-no-temporal-unet"): "TCVE - without the temporal U-Net (table II)",
    ("tcve", "tcve-no-unit"): "TCVE - without the unit (table II)",
    ("tcve", "tcve-no-attention"): "TCVE - unit without attention (table III)",
    ("tcve", "tcve-no-3d-convolution"): "TCVE - unit without 3-D convolution (table III)",
    ("stable-video", "tune-a-video"): "StableVideo - Tune-A-Video",
    (
        "stable-video",
        "stable-video-sequential",
    ): "StableVideo - key frames in sequence (fig. 11)",
    (
        "stable-video",
        "stable-video-random",
    ): "StableVideo - key frames from own noise (fig. 11)",
    ("stable-video", "stable-video-fixed"): "StableVideo - key frames from one noise (fig. 11)",
    ("stable-video", "stable-video-median"): "StableVideo - median in place of the network",
}
# The baseline first, then as they were published.
SHOWN = ("frame-by-frame", "tune-a-video", "ei2", "tcve", "blended-diffusion", "stable-video")
TITLES = {
    "accuracy": "target accuracy, %",
    "psnr": "background, dB",
    "temporal": "temporal error x 1000",
}
MARKED = re.compile(r"(<!-- report: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and the "id" of the row it was taken from."""

    text: str
    ref: str = ""


@dataclass(frozen=True)
class Table:
    """Columns' titles, rows of as many cells each, and the stored rows behind them."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    used: Sequence[dict] = ()

    def markdown(self) -> str:
        """The table as the README has it."""
        lines = [self.head, *self.rows]
        texts = [[x.text if isinstance(x, Cell) else x for x in line] for line in lines]
        head, *rows = (f"| {' | '.join(cells)} |\n" for cells in texts)
        return head + f"|{'---|' * len(self.head)}\n" + "".join(rows)


def update(text: str, results: Results) -> str:
    """The text with every marked table written anew.

    Raises:
        ValueError: a marker names no table.
    """

    def written(match: re.Match) -> str:
        opening, name, closing = match.groups()
        if name not in TABLES:
            raise ValueError(f"no table {name!r} to report: use one of {', '.join(TABLES)}")
        return opening + TABLES[name](results).markdown() + closing

    return MARKED.sub(written, text)


def estimate(values: Sequence[float], measure: str, sign: str = "", digits: int = 1) -> str:
    """Mean [95 % interval], or the mean alone where all values are one."""
    factor = MEASURES[measure][1]
    mean, low, high = (f"{v * factor:{sign}.{digits}f}" for v in interval(values))
    one = len({text.lstrip("+-") for text in (mean, low, high)}) == 1
    return mean if one else f"{mean} [{low}, {high}]"


def quality(results: Results) -> Table:
    """Means of every method over the scenes that it edited."""
    rows, found = newest("quality", results["quality"]), []
    for method in SHOWN:
        if own := [row for row in rows if row["method"] == method]:
            cells = (
                Cell(estimate([row["measures"][name] for row in own], name), own[0]["id"])
                for name in TITLES
            )
            found.append([method, *cells])
    return Table(["method", *TITLES.values()], found, [r for r in rows if r["method"] in SHOWN])


def ablation(results: Results) -> Table:
    """What the parts of two recipes are worth: paired differences on the same scenes."""
    return _paired(results, ABLATION, ("accuracy", "temporal"), "variant, against its method")


def systems(results: Results) -> Table:
    """Blended diffusion, TCVE and StableVideo: paired differences on the same scenes."""
    return _paired(results, SYSTEMS, tuple(TITLES), "against")


def _paired(results: Results, pairs: dict, measures: Sequence[str], corner: str) -> Table:
    rows, found = newest("quality", results["quality"]), []
    most = max((len(differences(rows, *pair, "accuracy")) for pair in pairs), default=0)
    for pair, name in pairs.items():
        if count := len(differences(rows, *pair, "accuracy")):
            first = next(row["id"] for row in rows if row["method"] == pair[0])
            cells = (Cell(estimate(differences(rows, *pair, m), m, "+"), first) for m in measures)
            found.append([name + f", {count} scenes" * (count < most), *cells])
    titles = ["target accuracy, points" if m == "accuracy" else TITLES[m] for m in measures]
    names = {name for pair in pairs for name in pair}
    return Table([corner, *titles], found, [row for row in rows if row["method"] in names])


def native(results: Results) -> Table:
    """Times of the reference and of composed PyTorch as multiples of ours."""
    by = {
        (row["op"], row["variant"], row["side"]): row
        for row in newest("native", results["native"])
    }
    found = []
    for (op, variant), (name, _) in NATIVE.items():
        own = [by.get((op, variant, side)) for side, _ in LEVELS]
        found.append([name, *map(_multiples, own)])
    heads = (f"{side} x {side}, {channels}" for side, channels in LEVELS)
    return Table(["reference / composed PyTorch, times ours", *heads], found, list(by.values()))


def _multiples(row: dict | None) -> Cell:
    if row is None:
        return Cell("not measured")
    ratios = (row[name] / row["native_s"] for name in ("reference_s", "cpu_s"))
    return Cell(" / ".join(f"{ratio:.1f}" for ratio in ratios), row["id"])


def runtimes(results: Results) -> Table:
    """The newest run of every runtime against the reference of the same run."""
    rows = newest("runtimes", results["runtimes"])
    found = [
        [
            f"{row['method']}, {row['runtime']}",
            Cell(f"{row['step_s'] * 1e3:.0f}", row["id"]),
            Cell(f"{row['reference_ratio']:.2f}", row["id"]),
            Cell(f"{row['first_s']:.1f}", row["id"]),
            row["date"][:10],
        ]
        for row in rows
    ]
    head = ["step under", "ms", "x reference, same run", "first loop of four steps, s", "date"]
    return Table(head, found, rows)


def edits(results: Results) -> Table:
    """Seconds of a whole edit, by its phases."""
    rows = newest("edits", results["edits"])
    phases = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
    found = [
        [f"{row['method']}, {row['runtime']}, {row['start']}"]
        + [Cell(f"{row['seconds'].get(name, 0):.1f}", row["id"]) for name in phases]
        for row in rows
    ]
    return Table(["seconds", *phases], found, rows)


def pipelines(results: Results) -> Table:
    """Every phase of every method that was timed, with its memory, beside ours."""
    rows = [row for row in newest("pipelines", results["pipelines"]) if row["seconds"]]
    found = []
    for row in rows:
        held = f"{row['peak_bytes'] / 2**20:,.0f}" if row["peak_bytes"] else "not measured"
        clip = f"{row['frames']} x {row['size'][1]} x {row['size'][0]}"
        values = (
            f"{row['seconds'] * 1e3:,.0f}",
            f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]",
            held,
        )
        found.append(
            [f"{row['method']}, {row['phase']}", row["model"], clip, row["dtype"],
             row["provider"], row["runtime"], *(Cell(value, row["id"]) for value in values)]
        )  # fmt: skip
    head = [
        "phase",
        "model",
        "clip",
        "dtype",
        "provider",
        "runtime",
        "ms",
        "x ours [95 %]",
        "peak MiB",
    ]
    return Table(head, found, rows)


def steps(results: Results, model: str = "half-sd") -> Table:
    """What a step takes a reference, as multiples of ours: seconds, then peak memory.

    Each cell is math attention's, then SDPA's.
    """
    rows = [row for row in newest("pipelines", results["pipelines"]) if row["model"] == model]
    by = {(r["method"], r["frames"], r["phase"], r["provider"]): r for r in rows}
    phases, found = ("inversion", "sampling", "tuning"), []

    def cell(clip: tuple, phase: str, measure: str) -> Cell:
        ours = by.get((*clip, phase, "ours"))
        if ours is None or ours[measure] is None:
            return Cell("")
        others = [by.get((*clip, phase, name)) for name in ("reference", "reference-sdpa")]
        ratios = [f"{row[measure] / ours[measure]:.2f}" if row and row[measure] else "not measured"
                  for row in others]  # fmt: skip
        return Cell(" / ".join(ratios), ours["id"])

    clips = dict.fromkeys((row["method"], row["frames"]) for row in rows)
    for method, frames in sorted(clips, key=lambda clip: clip[1]):
        cells = [
            cell((method, frames), phase, measure)
            for measure in ("seconds", "peak_bytes")
            for phase in phases
        ]
        found.append([f"{method}, {frames} frame{'s' * (frames > 1)}", *cells])
    titles = [f"{kind}, {phase}" for kind in ("time", "memory") for phase in phases]
    return Table(["math / SDPA, times ours", *titles], found, rows)


def memory(results: Results) -> Table:
    """What SD-1.5 holds at 512 x 512, and the longest clips."""
    rows, found = newest("memory", results["memory"]), []
    uses = list(dict.fromkeys(use for row in rows for use in row["bytes"]))
    for row in rows:
        cells = []
        for use in uses:
            held = row["bytes"].get(use)
            cells.append(Cell(f"{held / 2**30:.2f}" if held else "", row["id"]))
        for use in uses:
            clips = row["longest"].get(use, {})
            cells.append(Cell(" / ".join(map(str, clips.values())), row["id"]))
        found.append([f"{row['method']}, {row['frames']} frames, {row['dtype']}", *cells])
    titles = [f"{use}, GiB" for use in uses]
    return Table(["", *titles, *(f"frames in 8 / 16 / 24 GB, {use}" for use in uses)], found, rows)


def atlas(results: Results) -> Table:
    """Training of atlases: seconds and what they give back."""
    found = []
    for row in results["atlas"]:
        frames, height, width = row["shape"]
        seconds, said = row.get("seconds"), f"{row.get('projected_s', 0) / 3600:.1f} h, projected"
        quality = f"{row['psnr']:.1f}" if "psnr" in row else "not measured"
        size = f"{frames} x {width} x {height}"
        time = Cell(f"{seconds:.0f} s" if seconds else said, row["id"])
        found.append([row["clip"], size, f"{row['steps']:,}", time, Cell(quality, row["id"])])
    head = ["clip", "frames, width, height", "steps", "training", "dB"]
    return Table(head, found, results["atlas"])


def demo(results: Results) -> Table:
    """Means over the demo's clips."""
    shown = ("accuracy", "psnr", "temporal", "preprocess_s", "edit_s", "peak_mib")
    found = []
    for method, rows in _by(results["demo"], lambda row: row["method"]).items():
        cells = []
        for name in shown:
            _, factor, digits = MEASURES[name]
            values = [row[name] for row in rows if row[name] is not None]
            mean = f"{sum(values) / len(values) * factor:.{digits}f}" if values else "not measured"
            cells.append(Cell(mean, rows[0]["id"]))
        found.append([method, *cells])
    titles = (MEASURES[name][0].replace("\n", " ") for name in shown)
    return Table(["method", *titles], found, results["demo"])


def ops(results: Results) -> Table:
    """The newest row of every op, case, provider and form that was timed, fastest first."""
    timed = [row for row in newest("ops", results["ops"]) if row["median_s"] is not None]
    timed.sort(key=lambda row: (row["device"], row["op"], row["case"], row["median_s"]))
    found = []
    for row in timed:
        values = (
            f"{row['median_s'] * 1e6:.1f} [{row['p20_s'] * 1e6:.1f}, {row['p80_s'] * 1e6:.1f}]",
            f"{row['percent_of_limit']:.0f}",
            f"{row['vs_reference']:.2f}" if row["vs_reference"] else "",
            f"{row['peak_bytes'] / 2**20:.1f}",
        )
        name = f"{row['op']}, {row['case']}, {row['dtype']}{', backward' * row['backward']}"
        form = "" if row["form"] == "as used" else f" ({row['form']})"
        found.append([name, row["provider"] + form, *(Cell(v, row["id"]) for v in values)])
    head = ["op", "provider", "us [20, 80 %]", "% of limit", "x reference", "peak MiB"]
    return Table(head, found, timed)


def _by(rows: Iterable[dict], key: Callable) -> dict:
    found: dict = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


TABLES: dict[str, Callable[[Results], Table]] = {
    "quality": quality,
    "ablation": ablation,
    "systems": systems,
    "native": native,
    "steps": steps,
    "steps-embedded": partial(steps, model="embedded"),
    "pipelines": pipelines,
    "memory": memory,
    "runtimes": runtimes,
    "edits": edits,
    "atlas": atlas,
    "demo": demo,
    "ops": ops,
}
