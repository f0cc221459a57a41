"""Every op at its real shapes, by every provider: checked first, then timed against the limit.

A row of the results is one op, case, dtype, provider and form, present or absent with its reason.
Torch alone is needed; other libraries take part where they are installed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from tvkernels._dispatch import BACKENDS
from tvkernels.benchmarks import RESULTS, machine
from tvkernels.benchmarks.cases import (
    DTYPES,
    STAND_IN,
    inputs,
    line_up,
    number_of_sets,
)
from tvkernels.benchmarks.limits import Rates, limit, measure_rates
from tvkernels.benchmarks.ops import checks, rivals
from tvkernels.benchmarks.timing import Candidate, interleave, peak_bytes
from tvkernels.devices import out_of_memory
from tvkernels.testing.calls import copied, leaves, tensors
from tvkernels.testing.spec import OpSpec

ROWS = RESULTS / "ops.jsonl"
# What became of a provider. "lossy" missed the budget as its kind does, and is timed all the same.
TIMED, LOSSY, WRONG, CANNOT, ABSENT, SKIPPED = (
    "timed", "lossy", "wrong", "cannot", "absent", "skipped",
)  # fmt: skip
SLOW_ON_CPU = "compiles for up to minutes on a CPU: name it with --provider to run it"
STAND_INS = f"cases that end in {STAND_IN} are small stand-ins for real shapes"
FIELDS = (
    "op", "case", "shape", "dtype", "backward", "provider", "form", "status", "reason",
    "timing", "median_s", "p20_s", "p80_s", "samples", "vs_reference", "peak_bytes",
    "bytes", "flops", "exps", "limit_s", "bound", "percent_of_limit",
    "error", "budget", "checked", "rates", "sm_clock_mhz",
    "device", "driver", "torch", "triton", "ptxas", "unsafe_ptxas", "commit", "date",
)  # fmt: skip


@dataclasses.dataclass
class Settings:
    """How a run measures, beside what."""

    device: torch.device
    backward: bool = False
    seconds: float = 0.3  # of timing, for each provider of a case
    deadline: float = float("inf")  # time.monotonic() after which nothing new begins
    rates: dict[torch.dtype, Rates] = dataclasses.field(default_factory=dict)


def run(
    ops: Sequence[str] | None = None,
    cases: Sequence[str] | None = None,
    providers: Sequence[str] | None = None,
    *,
    device: str | None = None,
    dtypes: Sequence[str] | None = None,
    backward: bool = False,
    output: Path | None = None,
    seconds: float = 0.3,
    deadline: float = float("inf"),
    first: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict]:
    """Measures and appends a row at a time.

    Args:
        ops, cases, providers: names, repeated; all ops, their real cases (on a CPU smaller
            stand-ins) and every provider if None.
        device: "cpu", "cuda", "cuda:1"; the GPU where there is one if None.
        dtypes: names of `DTYPES`; bfloat16 on a GPU and float32 on a CPU if None.
        backward: forward and backward together, of the ops that have gradients.
        output: appended to; benchmarks/results/ops.jsonl if None.
        seconds: of timing, for each provider of a case.
        deadline: of `time.monotonic()`; what does not begin before it is a "skipped" row.
        first: leaves out so many pairs of dtype and case, which an earlier run has done.
        say: shows one line.
    Returns:
        The rows, each with all of `FIELDS`.
    Raises:
        ValueError: unknown op, case, provider, device or dtype; the text names what there is.
        OSError: the file cannot be written.
    """
    where = device_of(device)
    rivals.check_names(providers)
    chosen = [
        (spec, case) for spec, case in line_up(ops, cases, where) if not backward or spec.gradients
    ]
    names = dtypes or (["float32"] if where.type == "cpu" else ["bfloat16"])
    for name in names:
        if name not in DTYPES:
            raise ValueError(f"unknown dtype {name!r}: use one of {', '.join(DTYPES)}")
    if deadline < float("inf"):  # what it cuts off shall not be whole ops
        ranks = {pair: rank for _, own in itertools.groupby(chosen, key=lambda x: x[0].name)
                 for rank, pair in enumerate((s.name, c) for s, c in own)}  # fmt: skip
        chosen.sort(key=lambda x: ranks[x[0].name, x[1]])
    if not chosen:
        raise ValueError("none of these ops has gradients: leave out --backward")
    output = ROWS if output is None else output
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = Settings(where, backward, seconds, deadline)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    else:
        say(f"on a cpu: ratios mean something, times say little; {STAND_INS}")
    rows = []
    with output.open("a", encoding="utf-8") as file:
        for name, (spec, case) in list(itertools.product(names, chosen))[first:]:
            for row in measure_case(spec, case, DTYPES[name], providers, settings):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                rows.append(row)
                say(line(row))
    return rows


def device_of(name: str | None) -> torch.device:
    """The device of this name, or the one to use by default.

    Raises:
        ValueError: there is no such device.
    """
    available = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if available else "cpu"))
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}: use cpu, cuda or cuda:1 and so on") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"no measurements on {name!r}: use cpu, cuda or cuda:1 and so on")
    if device.type == "cpu":
        return torch.device("cpu")
    if not available:
        raise ValueError(f"torch {torch.__version__} sees no CUDA device: use --device cpu")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"no device cuda:{index}: there are {torch.cuda.device_count()}")
    return torch.device("cuda", index)


def measure_case(
    spec: OpSpec,
    case: str,
    dtype: torch.dtype,
    names: Sequence[str] | None,
    settings: Settings,
) -> Iterable[dict]:
    """Rows of every provider of one case: all checked, then the right ones timed together."""
    device = settings.device
    row = dict.fromkeys(FIELDS) | {
        "op": spec.name, "case": case, "shape": _plain(spec.cases[case]),
        "dtype": str(dtype).removeprefix("torch."), "backward": settings.backward,
    }  # fmt: skip
    row |= machine.facts(device) | {"date": machine.today()}
    if time.monotonic() > settings.deadline:
        return [row | {"provider": "all", "status": SKIPPED, "reason": "no time was left"}]
    if dtype not in settings.rates:
        settings.rates[dtype] = measure_rates(device, dtype)
    rates = settings.rates[dtype]
    least = limit(spec, case, dtype, rates, settings.backward)
    row |= {
        "bytes": least.bytes, "flops": least.flops, "exps": least.exps, "limit_s": least.seconds,
        "bound": least.bound, "rates": dataclasses.asdict(rates),
    }  # fmt: skip
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # what was compiled for other cases
    args = inputs(spec, case, dtype, device)
    found, part = [], None
    try:
        truth = checks.truth(spec, args, backward=settings.backward)
        found, right = check_all(spec, args, truth, row, names, settings)
        part = truth.part
        del truth
        outer = checks.outer_gradients(spec, args) if settings.backward else None
        time_together(spec, args, outer, right, settings)
    except Exception as error:
        if not out_of_memory(error):
            raise
        torch.cuda.empty_cache()
        skipped = _skipped(error)
        for result in found:
            if result["status"] in (TIMED, LOSSY) and result["median_s"] is None:
                result |= skipped
        found = found or [row | {"provider": "all"} | skipped]
    return [result | {"checked": part} for result in found]


def _skipped(error: Exception) -> dict:
    reason = f"too little memory: {str(error).partition('. ')[0]}"
    return {"status": SKIPPED, "reason": reason}


def check_all(
    spec: OpSpec, args, truth: checks.Truth, row: dict, names, settings: Settings
) -> tuple[list[dict], list[tuple[rivals.Provider, dict]]]:
    """A row for every provider, and those that are fit to be timed."""
    outer = checks.outer_gradients(spec, args) if settings.backward else None
    found, right = [], []
    for provider in rivals.line_up(spec, args, names, backward=settings.backward):
        result = row | {"provider": provider.name}
        found.append(result)
        if isinstance(provider, rivals.Absent):
            result |= {"status": ABSENT, "reason": provider.reason}
            continue
        result["form"] = provider.form
        if provider.slow_start and names is None and settings.device.type == "cpu":
            result |= {"status": SKIPPED, "reason": SLOW_ON_CPU}
            continue
        result |= check(spec, provider, args, outer, truth)
        if result["status"] in (TIMED, LOSSY):
            right.append((provider, result))
    return found, right


def check(spec: OpSpec, provider: rivals.Provider, args, outer, truth: checks.Truth) -> dict:
    """Status, error and budget of one provider's result, on poisoned memory."""
    guard = checks.poisoned() if not provider.slow_start else contextlib.nullcontext()
    checks.leave_nan(truth.low)
    with guard:
        call = bound(spec, provider, copied(args), outer)
        result, refusal = rivals.first_call(call)
    if refusal is not None:  # one of our own said that it would run this call
        return {"status": WRONG if provider.name in BACKENDS else CANNOT, "reason": refusal}
    public = result if outer is not None else provider.public(result)
    verdict = checks.judge(public, truth, only_first=provider.only_first and outer is None)
    numbers = {"error": verdict.error, "budget": verdict.budget}
    if verdict.right:
        return {"status": TIMED, **numbers}
    fault = verdict.fault or f"error {verdict.error:.3e} above its budget of {verdict.budget:.3e}"
    return {"status": LOSSY if provider.lossy else WRONG, "reason": fault, **numbers}


def bound(spec: OpSpec, provider: rivals.Provider, args, outer) -> Callable:
    """The provider's call on these arguments; with `outer`, forward and backward."""
    if outer is None:
        call = provider.bind(args)

        def forward():
            with torch.no_grad():
                return call()

        return forward
    leaves(spec, args)  # before anything is bound to them
    call = provider.bind(args)
    return lambda: checks.differentiate(spec, args, call, outer)


def time_together(spec: OpSpec, args, outer, right: list, settings: Settings) -> None:
    """Fills in times, memory and shares of the limit, all providers taking turns."""
    if not right:
        return
    device = settings.device
    size = sum(x.nbytes for x in tensors(args))
    sets = [copied(args) for _ in range(number_of_sets(size, device))]
    candidates, fit = [], []
    for provider, result in right:
        calls = [bound(spec, provider, own, outer) for own in sets]
        try:
            calls[0]()
            result["peak_bytes"] = peak_bytes(calls[0], device)
        except Exception as error:  # its first call, on memory of its own, went well
            if out_of_memory(error):
                torch.cuda.empty_cache()
                result |= _skipped(error)
            else:
                lost = WRONG if provider.name in BACKENDS else CANNOT
                result |= {"status": lost, "reason": f"its second call: {error}".splitlines()[0]}
            continue
        capturable = provider.capturable and outer is None
        candidates.append(Candidate(provider.name, calls, capturable))
        fit.append((provider, result))
    right = fit
    if not right:
        return
    if device.type == "cuda":
        _leave_room(candidates, [result["peak_bytes"] for _, result in right], device)
    times = interleave(candidates, device, settings.seconds)
    base = [t.median_s for (p, _), t in zip(right, times, strict=True) if p.name == "reference"]
    for (_, result), t in zip(right, times, strict=True):
        result |= {
            "timing": t.how, "median_s": t.median_s, "p20_s": t.p20_s, "p80_s": t.p80_s,
            "samples": t.samples, "sm_clock_mhz": t.sm_clock_mhz,
            "vs_reference": base[0] / t.median_s if base else None,
            "percent_of_limit": 100 * result["limit_s"] / t.median_s,
            "reason": result["reason"] or t.note,
        }  # fmt: skip


def _leave_room(candidates: Sequence[Candidate], peaks: Sequence[int], device) -> None:
    """A graph keeps what its calls held; the largest are left out until half the memory does."""
    room = torch.cuda.mem_get_info(device)[0] // 2
    kept = sum(peak for c, peak in zip(candidates, peaks, strict=True) if c.capturable)
    for c, peak in sorted(zip(candidates, peaks, strict=True), key=lambda pair: -pair[1]):
        if kept > room and c.capturable:
            c.capturable, kept = False, kept - peak


def line(row: dict) -> str:
    """One row in one line."""
    place = "" if row["device"] and not row["device"].startswith("cpu") else "cpu "
    head = f"{place}{row['op']} {row['case']} {row['dtype']}{' backward' * row['backward']}: "
    head += f"{row['provider']}{' (kernel)' * (row['form'] == rivals.KERNEL)}: "
    if row["median_s"] is None:
        return f"{head}{row['status']}: {row['reason']}"
    text = f"{row['median_s'] * 1e6:.1f} us, {row['percent_of_limit']:.0f} % of the limit"
    if row["vs_reference"] is not None:
        text += f", {row['vs_reference']:.2f} x the reference's speed"
    return head + text + (f" ({row['status']})" if row["status"] != TIMED else "")


def _plain(parameters) -> dict:
    """A case's parameters as JSON keeps them."""
    return json.loads(json.dumps(dict(parameters), default=str))
