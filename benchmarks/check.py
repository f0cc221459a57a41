"""`make bench-check`: what got slower or heavier, by more than the noise measured beside it.

`python -m tvkernels.benchmarks.check [--op OP ...] [--against REV | --store]`: every op on small
stand-ins of its real shapes, on the CPU. Times are ratios to the op's own plain reference, call by
call in turns, so that what else the machine does falls on both. They are compared with those of
another revision, measured now and in turns, or with what `--store` kept on this machine in
results/check.jsonl.

A case is slower where each of its ratios lies above each of the other side's, and does again once
all are measured anew; how far a side's own ratios lie apart is the noise. Bytes are exact. The
exit status is 1 where something got worse, 2 where there is nothing to compare with.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median

if __name__ == "__main__" and len(sys.argv) > 2 and sys.argv[1] == "--measure":
    # In a process of its own, for the tree named next: its own package, not the installed one.
    tree = sys.argv[2]
    sys.path[0] = tree
    import tvkernels

    tvkernels.__path__.append(tree)

import torch

from tvkernels.benchmarks import cases, machine, timing

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results" / "check.jsonl"
CPU = torch.device("cpu")
BLOCKS = 3  # ratios that a process gives for a case
SECONDS, FEWEST = 0.08, 3  # of each: at least so long, and so many pairs of calls
PROCESSES = 2  # for each side
LIBRARY = "tvkernels/_C_cpu.so"

# (op, case) -> ratios and bytes
Found = dict[tuple[str, str], tuple[list[float], int]]


def main(argv: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Measures, compares and says what got worse; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--op", action="append", help="repeat it; all ops by default")
    parser.add_argument("--against", metavar="REV", help="a revision, measured now")
    parser.add_argument("--store", action="store_true", help="keep what is measured")
    asked = parser.parse_args(argv)
    began = time.monotonic()
    facts = machine.facts(CPU)
    if asked.against:
        with tempfile.TemporaryDirectory() as folder:
            check_out(asked.against, Path(folder))
            found, before = in_turns(ROOT, Path(folder), asked.op)
            worse = confirmed(found, before, lambda ops: in_turns(ROOT, Path(folder), ops))
        said = f"{asked.against}, measured in turns"
    else:
        before = stored(facts["device"])
        if not before and not asked.store:
            say(f"no ratios of {facts['device']} in {RESULTS.name}: --store keeps some, and "
                "--against REV needs none")  # fmt: skip
            return 2
        found = together(measured(ROOT, asked.op) for _ in range(PROCESSES))
        worse = confirmed(found, before, lambda ops: (measured(ROOT, ops), {}))
        said = "what was stored on this machine"
    if asked.store:
        store(found, facts | {"date": machine.today()})
    for line in worse:
        say(line)
    say(f"{len(found.keys() & before.keys())} cases against {said}: {len(worse)} got worse "
        f"({time.monotonic() - began:.0f} s)")  # fmt: skip
    return 1 if worse else 0


def confirmed(found: Found, before: Found, again: Callable) -> list[str]:
    """What is worse, and still is with what `again(ops)` adds to both sides in place."""
    suspects = {op for op, case in worse(found, before)}
    if suspects:
        for side, more in zip((found, before), again(sorted(suspects)), strict=True):
            side.update(together([side, more]))
    return list(worse(found, before).values())


def worse(found: Found, before: Found) -> dict[tuple[str, str], str]:
    """A line for each case that is slower beyond both sides' spread, or holds more bytes."""
    lines = {}
    for key in found.keys() & before.keys():
        (now, held), (then, had) = found[key], before[key]
        faults = []
        if min(now) > max(then):
            noise = max(max(side) / min(side) for side in (now, then))
            faults.append(f"{median(now) / median(then):.2f} x the time (noise {noise:.2f} x)")
        if held > had:
            faults.append(f"{held:,} bytes after {had:,}")
        if faults:
            lines[key] = f"worse: {' '.join(key)}: {', '.join(faults)}"
    return dict(sorted(lines.items()))


def together(runs: Iterable[Found]) -> Found:
    """All ratios of several runs, and the fewest bytes: what is called first may hold more."""
    found: Found = {}
    for run in runs:
        for key, (ratios, held) in run.items():
            earlier, least = found.get(key, ([], held))
            found[key] = (earlier + ratios, min(held, least))
    return found


def in_turns(one: Path, other: Path, ops: Sequence[str] | None) -> tuple[Found, Found]:
    """Two trees, a process each time, A-B-B-A."""
    runs = {one: [], other: []}
    for turn in range(PROCESSES):
        for tree in (one, other) if turn % 2 == 0 else (other, one):
            runs[tree].append(measured(tree, ops))
    return together(runs[one]), together(runs[other])


def measured(tree: Path, ops: Sequence[str] | None) -> Found:
    """`measure`, in a new process that imports the tree's own package."""
    words = [sys.executable, str(Path(__file__).resolve()), "--measure", str(tree), *(ops or ())]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"cannot measure {tree}: {done.stderr.strip().splitlines()[-1]}")
    return {(op, case): (ratios, held) for op, case, ratios, held in json.loads(done.stdout)}


@torch.no_grad()
def measure(ops: Sequence[str] | None = None) -> Found:
    """Ratios of time to the plain reference, and the bytes held, of every case."""
    found: Found = {}
    for spec, case in cases.line_up(ops, None, CPU):
        given, named = cases.inputs(spec, case, torch.float32, CPU)
        ours, plain = (
            lambda b=b, s=spec, g=given, n=named: s.call(*g, **n, backend=b)
            for b in ("auto", "reference")
        )
        ours(), plain()
        ratios = [ratio(ours, plain) for _ in range(BLOCKS)]
        found[spec.name, case] = ratios, min(timing.peak_bytes(ours, CPU) for _ in range(2))
    return found


def ratio(ours: Callable, plain: Callable) -> float:
    """Median over pairs of calls of the one's time over the other's."""
    ratios, end = [], time.perf_counter() + SECONDS
    while len(ratios) < FEWEST or time.perf_counter() < end:
        one, two = (ours, plain) if len(ratios) % 2 == 0 else (plain, ours)
        start = time.perf_counter()
        one()
        middle = time.perf_counter()
        two()
        first, second = middle - start, time.perf_counter() - middle
        ratios.append(first / second if one is ours else second / first)
    return median(ratios)


def stored(device: str) -> Found:
    """The last ratios that were kept of every case on this device."""
    if not RESULTS.is_file():
        return {}
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    return {
        (row["op"], row["case"]): (row["ratios"], row["bytes"])
        for row in rows
        if row["device"] == device
    }


def store(found: Found, facts: dict) -> None:
    """Appends a row for each case."""
    with RESULTS.open("a", encoding="utf-8") as file:
        for (op, case), (ratios, held) in found.items():
            row = {"op": op, "case": case, "ratios": ratios, "bytes": held}
            file.write(json.dumps(row | facts) + "\n")


def check_out(revision: str, folder: Path) -> None:
    """A revision's files, with the native library where this checkout has one."""
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", revision], capture_output=True, check=False
    )
    if archive.returncode:
        raise SystemExit(f"git: {archive.stderr.decode().strip().splitlines()[-1]}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    if not (ROOT / LIBRARY).is_file():
        return
    same = ["git", "-C", str(ROOT), "diff", "--quiet", revision, "--", "csrc", "setup.py"]
    if subprocess.run(same).returncode == 0:
        shutil.copy(ROOT / LIBRARY, folder / LIBRARY)
        return
    wanted = os.environ | {"TVKERNELS_BUILD": "1", "TVKERNELS_CUDA_ARCHS": ""}
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(build, cwd=folder, env=wanted, check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps([[*key, *value] for key, value in measure(sys.argv[3:] or None).items()]))
    else:
        sys.exit(main())
