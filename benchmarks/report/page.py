"""The report as one page of HTML: no network, no script needed, every figure a link to its row."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path
from statistics import geometric_mean

from tvkernels.benchmarks.edits.quality import interval
from tvkernels.benchmarks.report import markup, tables
from tvkernels.benchmarks.report.figures import OURS, all_figures
from tvkernels.benchmarks.report.tables import Results
from tvkernels.benchmarks.stored import SOURCES, newest

HERE = Path(__file__).resolve().parent
SAME = "The same as a table"
REPRODUCE = """\
make setup
make demo                                              # demo
tvk bench quality --first 20 --scenes 20               # quality; --ablation for the variants
python -m tvkernels.benchmarks.ops.native                  # native
python -m tvkernels.benchmarks.edits.runtimes                # runtimes
python -m tvkernels.benchmarks.edits.atlas                   # atlas
tvk bench pipelines                                    # pipelines
tvk bench memory                                       # memory
make gpu                                               # ops, on a GPU, with torch and triton alone
make bench-check                                       # what got slower or heavier; AGAINST=REV
tvk report -o docs/report.html --readme                # this page, and the README's tables"""


def html(results: Results, media: markup.Media, command: str) -> str:
    """The page; the same rows and media give the same bytes.

    Args:
        command: what makes it, for the footer.
    """
    figures = all_figures(results)
    parts = (
        _head(results, figures),
        markup.section("pipelines", "Pipelines", _pipelines(results, figures)),
        markup.section("ops", "Ops", _ops(results, figures)),
        markup.section("runtimes", "Runtimes", _runtimes(results, figures)),
        markup.section("quality", "Quality", _quality(results, figures, media)),
        markup.section("scaling", "Scaling and memory", _scaling(results, figures)),
        markup.section(
            "reproduce", "How to reproduce", f"<pre><code>{escape(REPRODUCE)}</code></pre>"
        ),
        markup.section(
            "rows", "Raw rows", "".join(map(markup.raw, SOURCES, (results[n] for n in SOURCES)))
        ),
    )
    dates = sorted(row["date"][:10] for rows in results.values() for row in rows if "date" in row)
    count = sum(map(len, results.values()))
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>tvkernels: what was '
        'measured</title>\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<style>\n{style}</style>\n'
        f"{''.join(parts)}<footer>{count} rows"
        f"{f', the newest of {dates[-1]}' if dates else ''}. Made by <code>{escape(command)}"
        f"</code>.</footer>\n<script>\n{script}</script>\n</html>\n"
    )


def _head(results: Results, figures: dict) -> str:
    links = {
        "pipelines": "Pipelines", "ops": "Ops", "runtimes": "Runtimes", "quality": "Quality",
        "scaling": "Scaling and memory", "reproduce": "How to reproduce", "rows": "Raw rows",
    }  # fmt: skip
    tiles = list(_tiles(results, figures))
    least = {4: 15, 5: 12.5}.get(len(tiles), 20)  # so that a wide page's rows are full
    nav = "".join(f'<a href="#{name}">{title}</a>' for name, title in links.items())
    return (
        '<header><h1>tvkernels, measured</h1><p class="lead">Video editing with Stable Diffusion '
        "1.x: attention over frames as fused ops, processors for diffusers, lean one-shot "
        "pipelines.</p><p>Ratios are of medians of interleaved runs: above 1 ours is faster. "
        "Every figure leads to the row that holds it, with its device, commit and date; what was "
        f"not measured says so.</p><nav>{nav}</nav></header>"
        f'<div class="tiles" style="--least:{least}rem">{"".join(tiles)}</div>'
    )


def _tiles(results: Results, figures: dict) -> Iterable[str]:
    native = newest("native", results["native"])
    if phases := figures["pipelines"]:
        chart = next((f for f in phases if "sampling" in f.chart.title), phases[0]).chart
        plain = [
            mark for lane in chart.lanes for mark in lane.marks
            if chart.series[mark.series] == "reference"
        ]  # fmt: skip
        if plain:
            mean = geometric_mean(mark.value for mark in plain)
            yield _tile(
                f"{mean:.1f} ×", f"the reference implementations' speed: {chart.title.lower()}, "
                f"geometric mean of {len(plain)} method{'s' * (len(plain) > 1)}", plain[0].ref,
            )  # fmt: skip
    if native:
        ratios = [row["reference_s"] / row["native_s"] for row in native]
        best = max(native, key=lambda row: row["reference_s"] / row["native_s"])
        yield _tile(
            f"{geometric_mean(ratios):.1f} ×", f"the plain reference's speed on a CPU, geometric "
            f"mean of {len(ratios)} calls; {min(ratios):.1f} to {max(ratios):.1f}", best["id"],
        )  # fmt: skip
    held = [row for row in native if row.get("native_bytes")]
    if held:
        row = max(held, key=lambda r: r["reference_bytes"] - r["native_bytes"])
        sizes = (row[name] / 2**20 for name in ("native_bytes", "reference_bytes"))
        yield _tile("{:.0f} of {:.0f} MiB".format(*sizes), f"held by {_named(row)}", row["id"])
    if steps := newest("runtimes", results["runtimes"]):
        row = min(steps, key=lambda r: r["step_s"])
        yield _tile(
            f"{row['reference_ratio']:.1f} ×", f"the reference's speed of a whole sampling step, "
            f"{row['method']} under {row['runtime']}", row["id"],
        )  # fmt: skip
    if rows := newest("quality", results["quality"]):
        best = {
            name: interval(r["measures"]["accuracy"] for r in rows if r["method"] == name)
            for name in tables.SHOWN
            if any(r["method"] == name for r in rows)
        }
        name = max(best, key=lambda key: best[key][0])
        mean, low, high = (100 * v for v in best[name])
        row = next(r for r in rows if r["method"] == name)
        yield _tile(
            f"{mean:.0f} % on target", f"{name}, 95 % interval [{low:.0f}, {high:.0f}], against "
            "an exact truth", row["id"],
        )  # fmt: skip
    gpu = [r for r in results["ops"] if r["median_s"] and not r["device"].startswith("cpu")]
    ours = [r for r in gpu if r["provider"] in OURS and r["vs_reference"]]
    if ours:
        mean = geometric_mean(row["vs_reference"] for row in ours)
        yield _tile(
            f"{mean:.1f} ×", f"the reference's speed on {gpu[-1]['device']}", ours[-1]["id"]
        )
    else:
        yield '<div class="tile none"><b>not measured</b><span>on a GPU yet</span></div>'


def _tile(big: str, small: str, ref: str) -> str:
    return f'<a class="tile" href="#{ref}"><b>{escape(big)}</b><span>{escape(small)}</span></a>'


def _named(row: dict) -> str:
    name = tables.NATIVE[row["op"], row["variant"]][0]
    return f"{name} at {row['side']} x {row['side']}, the rest by the plain reference"


def _pipelines(results: Results, figures: dict) -> str:
    body = markup.cards(figures["pipelines"], "pipelines") + markup.table(
        "pipelines", results, SAME
    )
    body += markup.untimed(results["pipelines"], "seconds", ("provider", "runtime", "phase"))
    body += "<h3>The demo: three clips of the shapes world</h3>"
    body += markup.table("demo", results)
    body += "<h3>Layered atlases</h3>" + markup.table("atlas", results)
    return body


def _ops(results: Results, figures: dict) -> str:
    on_gpu = any(not row["device"].startswith("cpu") for row in results["ops"])
    body = "" if on_gpu else markup.absent("ops")
    if results["ops"]:
        body += markup.cards(figures["ops"], "ops") + markup.table("ops", results, SAME)
        body += markup.untimed(results["ops"], "median_s", ("provider", "op"))
    body += (
        "<h3>On a CPU: C++ kernels</h3><p>Times of others as multiples of the C++ kernel's, "
        "float32, 8 frames. Right of the dashed line the kernel is faster.</p>"
    )
    body += markup.cards(figures["speed"], "native") + markup.table("native", results, SAME)
    body += (
        "<h3>Against the limit</h3><p>The least time that bytes, flops and exponentials allow, "
        "over the time taken. Bytes are counted at the rate of a copy that stays in the cache, "
        "which these calls' tensors do not: what moves memory cannot come near 100 %.</p>"
    )
    return body + markup.cards(figures["limit"], "native")


def _runtimes(results: Results, figures: dict) -> str:
    drawn = figures["runtimes"] + figures["edits"]
    both = markup.cards(drawn, "runtimes") if drawn else ""
    body = markup.table("runtimes", results, "The step as a table, with what the first loop takes")
    return both + body + markup.table("edits", results, "The edits as a table")


def _quality(results: Results, figures: dict, media: markup.Media) -> str:
    body = (
        "<p>The shapes world has an exact truth for every edit. Target accuracy: share of frames "
        "whose object the world's own classifier names with the target's colour and shape. "
        "Background: PSNR outside both true masks. Temporal error: mean absolute difference after "
        "carrying a frame to the next by the known motion.</p>"
    )
    body += markup.cards(figures["quality"], "quality") + markup.table("quality", results, SAME)
    body += "<h3>Paired on the same scenes</h3>" + markup.table("systems", results)
    body += "<h3>What the parts are worth</h3>" + markup.table("ablation", results)
    body += "<h3>Clips</h3>" + (markup.players(media) if media.scenes else markup.none("Clips"))
    return body + "".join(markup.sheet(*sheet) for sheet in media.sheets)


def _scaling(results: Results, figures: dict) -> str:
    body = markup.cards(figures["scaling"], "scaling")
    body = body or markup.none(markup.SAYS["scaling"], SOURCES["pipelines"].command)
    body += markup.cards(figures["memory"], "native")
    body += "<h3>Stable Diffusion 1.5 at 512 x 512, by accounting</h3>"
    return body + markup.table("memory", results)
