"""What editing and tuning hold on the real SD-1.5 configuration, by accounting alone.

`tvkernels.runtime.memory` runs the modules on fake tensors: no weights, no device. A row of the
results is a method, a number of frames and a dtype; the longest clips under a budget come from the
line through the two largest numbers of frames, for every tensor is one of each frame or of none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tvkernels.benchmarks import RESULTS, machine
from tvkernels.benchmarks.edits.models import DTYPES, SD15_TEXT, SD15_UNET, SD15_VAE
from tvkernels.benchmarks.stored import kept
from tvkernels.config import ConfigError
from tvkernels.recipes import RECIPES
from tvkernels.runtime.memory import Account

ROWS = RESULTS / "memory.jsonl"
BUDGETS = (8, 16, 24)  # GB, 10^9 bytes
SIZE = (512, 512)
USES = ("inference", "training", "training, checkpointing")
# Table 1 of EI2, GiB on a device at 8 frames of 512 x 512: inference and training.
PAPER = {"ei2": (5.3, 11.0), "tune-a-video": (5.3, 9.6)}


def run(
    methods: Sequence[str] | None = None,
    frames: Sequence[int] = (8, 24),
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    *,
    checkpointing: bool = True,
    output: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict]:
    """Accounts for every method and appends a row at a time.

    Args:
        methods: names of `RECIPES`, all if None. StableVideo's UNet is that of frame-by-frame at
            one frame; its atlas is not accounted for.
        frames: of the clip, each number.
        dtypes: names of `models.DTYPES`; tuning in float16 is refused, so it is left out there.
        checkpointing: tuning under it is accounted for too.
        output: appended to; benchmarks/results/memory.jsonl if None.
        say: shows one line.
    Returns:
        The rows.
    Raises:
        ConfigError: an unknown name or number.
        VideoError: the file cannot be written.
    """
    methods, frames = list(RECIPES if methods is None else methods), sorted(set(frames))
    for kind, names, known in (("method", methods, RECIPES), ("dtype", dtypes, DTYPES)):
        for name in names:
            if name not in known:
                raise ConfigError(f"unknown {kind} {name!r}: use one of {', '.join(known)}")
    if not frames or frames[0] < 1:
        raise ConfigError("frames are numbers above zero")
    output, rows = ROWS if output is None else output, []
    found = itertools.chain.from_iterable(
        _account(method, frames, dtype, checkpointing)
        for method, dtype in itertools.product(methods, dtypes)
    )
    for row in kept(found, output):
        rows.append(row)
        say(line(row))
    return rows


def _account(
    method: str, frames: Sequence[int], dtype: str, checkpointing: bool
) -> Iterable[dict]:
    seen: list[dict] = []
    for count in frames:
        account = Account(
            SD15_UNET, SD15_VAE, SD15_TEXT, RECIPES[method], frames=count, size=SIZE,
            dtype=DTYPES[dtype],
        )  # fmt: skip
        held = uses(account, checkpointing)
        seen.append({"frames": count, **held})
        longest = {}
        if len(seen) > 1:
            longest = {
                use: {f"{gb}GB": clip(gb * 10**9, seen, use) for gb in BUDGETS} for use in held
            }
        yield {
            "method": method, "model": "sd15", "frames": count, "size": list(SIZE), "dtype": dtype,
            "weight_bytes": account.weight_bytes(), "bytes": held, "longest": longest,
            "commit": machine.commit(), "date": machine.today(),
        }  # fmt: skip


def uses(account: Account, checkpointing: bool) -> dict[str, int]:
    """Use of `USES` -> bytes at the peak, the weights of all models included.

    Inference is a guided step or the VAE at one frame, whichever holds more.
    """
    weights = account.weight_bytes()
    found = {"inference": weights + max(account.sampling(2), account.coding(1))}
    if account.tuned and account.dtype != DTYPES["float16"]:
        for use, on in zip(USES[1:], (False, True)[: 1 + checkpointing], strict=False):
            found[use] = weights + account.tuning(on)
    return found


def clip(budget: int, points: Sequence[dict], use: str) -> int:
    """The most frames under a budget, 0 if not one, by the line through the last two points.

    Args:
        budget: bytes.
        points: {"frames": number, use: bytes}, two or more of rising numbers.
        use: which bytes.
    """
    (x0, y0), (x1, y1) = ((point["frames"], point[use]) for point in points[-2:])
    slope = (y1 - y0) / (x1 - x0)
    return max(0, int((budget - y0) / slope + x0))


def line(row: dict) -> str:
    """One row in one line."""
    held = ", ".join(f"{use} {size / 2**30:.2f} GiB" for use, size in row["bytes"].items())
    return f"{row['method']}, {row['frames']} of 512 x 512, {row['dtype']}: {held}"


def show(rows: Sequence[dict], console: Console) -> None:
    """Bytes of every row beside the paper's, the longest clips, and what stored maps take."""
    table = Table(title="GiB at 512 x 512, weights included, by accounting", title_justify="left")
    clips = Table(title="frames that fit, by accounting", title_justify="left")
    for name in ("method", "dtype", "frames", *USES, "EI2's table 1"):
        table.add_column(name, justify="left" if name in ("method", "dtype") else "right")
    for name in ("method", "dtype", "use", *(f"{gb} GB" for gb in BUDGETS)):
        clips.add_column(name, justify="right" if name.endswith("GB") else "left")
    for row in rows:
        paper = PAPER.get(row["method"]) if row["frames"] == 8 else None
        held = (row["bytes"].get(use) for use in USES)
        table.add_row(
            row["method"], row["dtype"], str(row["frames"]),
            *("" if size is None else f"{size / 2**30:.2f}" for size in held),
            "" if paper is None else f"inference {paper[0]}, training {paper[1]}",
        )  # fmt: skip
    last = {(row["method"], row["dtype"]): row["longest"] for row in rows}
    for (method, dtype), longest in last.items():
        for use, found in longest.items():
            clips.add_row(method, dtype, use, *map(str, found.values()))
    console.print(table)
    if clips.rows:
        console.print(clips)
    maps = Table(title="attention of all steps, kept: 8 frames, 50 steps, float16, GB",
                 title_justify="left")  # fmt: skip
    for name in ("keys of", "every map", "self-attention maps", "their queries and keys"):
        maps.add_column(name, justify="right")
    for text, read in (("the middle frame", 1), ("the first and the previous", 2)):
        kept = stored_attention(8, read)
        total = kept["self"] + kept["cross"]
        sizes = (total, kept["self"], kept["queries and keys"])
        maps.add_row(text, *(f"{size / 1e9:.1f}" for size in sizes))
    console.print(maps)


def stored_attention(
    frames: int, read: int, *, steps: int = 50, side: int = 64, largest: int = 32, item: int = 2,
    tokens: int = 77,
) -> dict[str, int]:  # fmt: skip
    """Bytes of FateZero's store: each probability map of up to 32 x 32 queries, in every step.

    A map of self-attention is softmax(Q K^T), so that Q and K give it back exactly; kept are those
    where they are smaller than it.

    Args:
        frames: of the clip.
        read: frames whose keys each frame reads; 1 is one frame for all, kept once.
        steps: of the inversion.
        side: of the latents.
        largest: side of the largest maps' queries.
        item: bytes of a number.
        tokens: of the text.
    Returns:
        "self" and "cross", the maps, and "queries and keys", in place of the first.
    """
    widths, heads = (320, 640, 1280, 1280), 8
    layers = (5, 5, 5, 1)  # of SD-1.x's UNet at each level, the middle's last
    found = dict.fromkeys(("self", "cross", "queries and keys"), 0)
    for level, (width, count) in enumerate(zip(widths, layers, strict=True)):
        n = (side >> level) ** 2
        if n > largest**2:
            continue
        each = count * steps * item
        own = frames * heads * n * n * read
        found["self"] += each * own
        found["cross"] += each * frames * heads * n * tokens
        keys = 1 if read == 1 else frames
        found["queries and keys"] += each * min(own, (frames + keys) * n * width)
    return found
