"""`make gpu`: the kernels on the device, right first, then fast, in under ten minutes.

1. Every op, case and dtype, backward too, against the reference in float64.
2. Every kernel 20 times on the same inputs: other bits are a race.
3. The bench of `run.py`, and its report.
4. Where `nsys` is, a report of Nsight Systems over a short sampling loop.

Torch and triton are all this needs. Rows are on disk as soon as they are made; each step has its
share of the time and says what it had to leave out. The exit status is 1 where anything is wrong,
where a shipped kernel was refused throughout, and where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tvkernels import _native
from tvkernels._dispatch import ON_DEVICE, OPS
from tvkernels.benchmarks import RESULTS, machine
from tvkernels.benchmarks.cases import DTYPES
from tvkernels.benchmarks.ops import gate, report, rivals
from tvkernels.benchmarks.ops import run as bench
from tvkernels.benchmarks.profiling import nsight
from tvkernels.ops import NAMES, specs

MINUTES = 9.0  # of ten: the report is drawn after them
CHECKING = 0.45  # of the time at most, for steps 1 and 2
GRACE = 20.0  # seconds that a process may overrun before it is ended
QUICK = [n for n in rivals.NAMES if n not in (rivals.COMPILED, rivals.FLEX, "sage")]
SLOW = [rivals.COMPILED, rivals.FLEX, "sage"]
# (dtype, providers, backward, share of the time still left), the most telling first. What a pass
# leaves over goes to the next; rivals that compile would take all there is.
PASSES = (
    ("bfloat16", QUICK, False, 0.6),
    ("bfloat16", SLOW, False, 0.7),
    ("bfloat16", QUICK, True, 0.7),
    ("float16", QUICK, False, 1.0),
)
AT_ONCE = 8  # processes that check


@dataclass
class Plan:
    """What the command line asks for."""

    device: torch.device
    ops: list[str]
    minutes: float
    folder: Path
    again: list[str]  # the command that starts this script once more
    small: bool = False  # a rehearsal: no real shapes

    @property
    def checks(self) -> Path:
        """Rows of steps 1 and 2."""
        return self.folder / "gpu-checks.jsonl"

    @property
    def times(self) -> Path:
        """Rows of step 3."""
        return self.folder / "gpu-ops.jsonl"

    def command(self, step: str, *words: str) -> list[str]:
        """Starts one step in a process of its own."""
        place = ["--device", str(self.device), "--output", str(self.folder)]
        return [*self.again, "--step", step, *place, *words, *["--small"] * self.small]


def main(argv: Sequence[str] | None = None, again: Sequence[str] = ()) -> int:
    """Runs all steps, or as `--step` one share of a step.

    Args:
        argv: the command line without the program.
        again: what starts this script; by default the package's own module.
    """
    given = _arguments(argv)
    try:
        device = bench.device_of(given.device)
    except ValueError as error:
        reason = str(error).partition(":")[0]
        print(f"make gpu: {reason}; nothing was run", file=sys.stderr)
        return 1
    again = list(again) or [sys.executable, "-m", "tvkernels.benchmarks"]
    ops = given.op or list(NAMES)
    plan = Plan(device, ops, given.minutes, given.output, again, given.small)
    plan.folder.mkdir(parents=True, exist_ok=True)
    if given.step == "check":
        return check_share(plan, given.dtype, given.until)
    if given.step == "bench":
        return bench_share(plan, given)
    if given.step == "sample":
        nsight.sample(plan.device, plan.ops)
        return 0
    return everything(plan)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tvkernels.benchmarks", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cpu is a rehearsal of this script")
    parser.add_argument("--op", action="append", choices=NAMES, help="repeat it; all by default")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all steps together")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    parser.add_argument("--small", action="store_true", help="leave out the real shapes")
    hidden = argparse.SUPPRESS
    parser.add_argument("--step", choices=("check", "bench", "sample"), help=hidden)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help=hidden)
    parser.add_argument("--until", type=float, default=float("inf"), help=hidden)
    parser.add_argument("--pass", dest="number", type=int, default=0, help=hidden)
    parser.add_argument("--first", type=int, default=0, help=hidden)
    return parser.parse_args(argv)


def everything(plan: Plan) -> int:
    """All steps, the summary, and the exit status."""
    began = time.time()
    end = began + 60 * plan.minutes
    for path in (plan.checks, plan.times):
        path.unlink(missing_ok=True)
    known = machine.facts(plan.device)
    print(", ".join(f"{name} {value}" for name, value in known.items()), flush=True)
    if plan.device.type == "cuda" and (reasons := _refused(plan.device)):
        print(f"make gpu: nothing was run: {'; '.join(reasons)}", file=sys.stderr)
        return 1
    checking(plan, began + CHECKING * (end - began))
    checks = _rows(plan.checks)
    print(_passed("checks and repeats", checks, began), flush=True)
    unseen = nsight.why_not(plan.device)
    benching(plan, end - GRACE - (0 if unseen else nsight.SECONDS + nsight.WRITING))
    times = _rows(plan.times)
    print(_passed("bench", times, began), flush=True)
    print(traced(plan) if unseen is None else f"Nsight Systems: not taken: {unseen}", flush=True)
    faults = summary(checks, times, plan.ops)
    print("\n".join(faults) if faults else "make gpu: all that was run is right")
    print(f"rows are in {plan.checks} and {plan.times}; {time.time() - began:.0f} s in all")
    sys.stdout.flush()
    if any(row["median_s"] for row in times):  # the verdict is out, whatever becomes of pictures
        report.write(plan.times, say=print)
    return 1 if faults else 0


def _refused(device: torch.device) -> list[str]:
    """Why attention would not run at all; minutes of a device are worth more than the rest."""
    try:
        from tvkernels._triton import support
    except ImportError:  # each op will say so
        return []
    return support.why_not(torch.empty(1, device=device), matrices=True)


def checking(plan: Plan, until: float) -> None:
    """Steps 1 and 2: a process for each op and dtype, some at a time, each compiling its own."""
    waiting = [(op, dtype) for op in plan.ops for dtype in DTYPES]
    at_once = max(1, min(AT_ONCE, (os.cpu_count() or 1) // 2))
    running: dict[subprocess.Popen, tuple[str, str]] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            op, dtype = waiting.pop(0)
            words = ("--op", op, "--dtype", dtype, "--until", str(until))
            running[subprocess.Popen(plan.command("check", *words))] = (op, dtype)
        for process, (op, dtype) in list(running.items()):
            late = time.time() > until + GRACE
            if process.poll() is None and not late:
                continue
            running.pop(process)
            status = _end(process)
            if late or status:
                why = "it outran its time" if late else f"its process ended with status {status}"
                _append(plan.checks, _loss("check", op, dtype, why, skipped=late))
        time.sleep(0.1)


def check_share(plan: Plan, dtype: str, until: float) -> int:
    """One op in one dtype: the rows are appended as they come, and say what is wrong."""
    if plan.device.type == "cuda":
        # Beyond this a truth is taken of one head; attention's alone would fill the device.
        torch.cuda.set_per_process_memory_fraction(2 / AT_ONCE, plan.device)
        torch.backends.cudnn.allow_tf32 = False  # the yardstick's convolutions are IEEE's too
    for name in plan.ops:
        spec, backends = specs()[name], tuple(b for b in OPS[name].backends if b != "reference")
        chosen = gate.jobs(spec, backends, real=not plan.small)
        try:
            for row in gate.run(spec, DTYPES[dtype], plan.device, chosen, until):
                _append(plan.checks, row)
        except gate.DeviceLost as error:
            _append(plan.checks, _loss("check", name, dtype, f"the device was lost: {error}"))
            break
    return 0


def benching(plan: Plan, end: float) -> None:
    """Step 3: a process for each pass; one that dies starts again behind the case it died at."""
    for number, (dtype, providers, backward, share) in enumerate(PASSES):
        until = time.time() + share * (end - time.time())
        if providers is SLOW and plan.device.type == "cpu":
            continue  # a rehearsal that compiled would take an hour
        first = 0
        while True:
            before = len(_rows(plan.times))
            words = [word for op in plan.ops for word in ("--op", op)]
            words += ["--pass", str(number), "--first", str(first), "--until", str(until)]
            process = subprocess.Popen(plan.command("bench", *words), stdout=subprocess.DEVNULL)
            try:
                process.wait(max(until + GRACE / 2 - time.time(), 1))
            except subprocess.TimeoutExpired:
                _end(process)
                why = f"pass {number} outran its time"
                _append(plan.times, lost_time(plan, dtype, backward, why, bench.SKIPPED))
                break
            if process.returncode == 0:
                break
            done = {(row["op"], row["case"]) for row in _rows(plan.times)[before:]}
            first += len(done) + 1
            why = f"the process ended with status {process.returncode} after {len(done)} cases"
            _append(plan.times, lost_time(plan, dtype, backward, why, bench.WRONG))
            if not done and first > 3:  # it dies at whatever it is given
                break


def bench_share(plan: Plan, given: argparse.Namespace) -> int:
    """One pass of the bench."""
    dtype, providers, backward, _ = PASSES[given.number]
    ops = [op for op in plan.ops if not backward or specs()[op].gradients]
    if ops:
        bench.run(
            ops, None, providers, device=str(plan.device), dtypes=[dtype], backward=backward,
            output=plan.times, seconds=0.15, first=given.first, say=print,
            deadline=time.monotonic() + given.until - time.time(),
        )  # fmt: skip
    return 0


def traced(plan: Plan) -> str:
    """Step 4, in a line."""
    words = [word for op in plan.ops for word in ("--op", op)]
    return nsight.record(plan.command("sample", *words), plan.folder)


def summary(checks: Sequence[dict], times: Sequence[dict], ops: Sequence[str]) -> list[str]:
    """Every fault in a line; prints what was left out, and our own times."""
    rows = [*checks, *times]
    faults = [f"WRONG: {_place(row)}: {row['reason']}" for row in rows if _wrong(row)]
    for op in ops:
        for backend in (b for b in OPS[op].backends if b in ON_DEVICE):
            own = [r for r in checks if r["op"] == op and r["backend"] == backend]
            if any(row["status"] in (gate.RIGHT, gate.WRONG) for row in own):
                continue
            why = next((row["reason"] for row in own), "nothing was run")
            if backend == "cuda" and _native.why_not("cuda"):  # a library one may do without
                print(f"left out: {op} on cuda: {why}")
            else:
                faults.append(f"NEVER RUN: {op} on {backend}: {why}")
    left = Counter((r["op"], r["reason"]) for r in rows if r["status"] == gate.SKIPPED)
    for (op, reason), count in left.items():
        print(f"left out: {op}: {count} rows: {reason}")
    for row in times:
        if row["provider"] in ON_DEVICE and row["median_s"] is not None:
            print(bench.line(row))
    return faults


def _wrong(row: dict) -> bool:
    """A rival's wrong result is its own affair: it is in the table, and fails nothing."""
    ours = "provider" not in row or row["provider"] in OPS_BACKENDS
    return row["status"] == gate.WRONG and ours


# "all" stands for a whole pass that died.
OPS_BACKENDS = (*ON_DEVICE, "cpu", "all")


def _place(row: dict) -> str:
    names = ("step", "op", "case", "dtype", "backend", "provider", "layout")
    text = " ".join(str(row[name]) for name in names if row.get(name))
    return text + " backward" * bool(row.get("backward"))


def _passed(step: str, rows: Sequence[dict], began: float) -> str:
    counts = Counter(row["status"] for row in rows)
    text = ", ".join(f"{count} {status}" for status, count in counts.items()) or "no rows"
    return f"{step}: {text}; {time.time() - began:.0f} s"


def _loss(step: str, op: str, dtype: str, why: str, skipped: bool = False) -> dict:
    status = gate.SKIPPED if skipped else gate.WRONG
    return {
        "step": step, "op": op, "case": "the rest", "dtype": dtype, "backend": None,
        "backward": None, "layout": None, "error": None, "budget": None, "checked": None,
        "status": status, "reason": why,
    }  # fmt: skip


def lost_time(plan: Plan, dtype: str, backward: bool, why: str, status: str) -> dict:
    """A row that stands for what a pass of the bench did not come to."""
    row = dict.fromkeys(bench.FIELDS) | machine.facts(plan.device) | {"date": machine.today()}
    return row | {
        "op": "the rest of the bench", "case": "all", "dtype": dtype, "backward": backward,
        "provider": "all", "status": status, "reason": why,
    }  # fmt: skip


def _end(process: subprocess.Popen) -> int:
    """The exit status of a process, ended if it still runs."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def _append(path: Path, row: dict) -> None:
    """One write for a line: several processes append to one file."""
    with path.open("ab", buffering=0) as file:
        file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def _rows(path: Path) -> list[dict]:
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if path.exists()
        else []
    )
