"""Whole methods, phase by phase: seconds, memory and operations, beside their plain references.

A row of the results is one method, model, number of frames, size, phase, provider and runtime.
What is timed has been compared with ours first, and all providers of a phase take turns.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tvkernels.benchmarks import RESULTS, machine
from tvkernels.benchmarks.edits import meter, models, steps
from tvkernels.benchmarks.edits.turns import Turns, ratio, take_turns
from tvkernels.benchmarks.ops.run import ABSENT, SKIPPED, TIMED, WRONG
from tvkernels.benchmarks.stored import kept
from tvkernels.benchmarks.timing import peak_bytes, quantiles
from tvkernels.config import EMBEDDED, ConfigError
from tvkernels.devices import out_of_memory
from tvkernels.pipelines import METHODS
from tvkernels.pipelines.checks import latent_side
from tvkernels.runtime import BACKENDS

ROWS = RESULTS / "pipelines.jsonl"
# Distance from ours at most, over the distance that the phase goes. EI2 on the embedded model, two
# frames of 64 x 64: a step of inversion 1.2e-4, of sampling 4.2e-4, where it goes least (t = 1),
# and two of tuning 4.4e-4; AdamW's first steps have the gradients' signs, of zeros as well.
LIMITS = {"float32": 1e-2, "bfloat16": 0.5, "float16": 0.1}
TUNING_LIMIT = 0.1
STEPS_A_CALL = 2  # by default
FIELDS = (
    "method", "model", "frames", "size", "tokens", "phase", "provider", "runtime", "backend",
    "dtype", "status", "reason", "seconds", "p20_s", "p80_s", "samples", "steps", "ratio",
    "ratio_low", "ratio_high", "error", "limit", "unet_calls", "flops", "bytes", "peak_bytes",
    "weight_bytes", "resident_bytes", "energy_j", "method_steps",
    "device", "driver", "torch", "triton", "ptxas", "unsafe_ptxas", "commit", "date",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How a run measures.

    Args:
        model, backend, dtype: what is measured.
        steps: steps in a call of a step's phase; of the whole ones, in place of the method's.
        tune_steps: of the whole ones, in place of the method's.
        seconds: of timing aimed at, for each provider of a phase.
        resident: a fresh process for each row tells its resident peak too.
    """

    model: str = EMBEDDED
    backend: str = "auto"
    dtype: str = "float32"
    steps: int | None = None
    tune_steps: int | None = None
    seconds: float = 10.0
    resident: bool = False


@dataclass
class Entrant:
    """A provider under a runtime, None where it cannot take part, and what its rows begin with."""

    one: object | None
    row: dict


def run(
    methods: Sequence[str] | None = None,
    frames: Sequence[int] = (8,),
    sizes: Sequence[tuple[int, int]] | None = None,
    phases: Sequence[str] = steps.STEPS,
    providers: Sequence[str] = steps.PROVIDERS,
    runtimes: Sequence[str] = ("eager",),
    *,
    settings: Settings | None = None,
    output: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict]:
    """Measures and appends a row at a time.

    Args:
        methods: names of `METHODS`, all if None.
        frames: of the clip, each number.
        sizes: (height, width) in pixels, each; the model's own square if None.
        phases: of `steps.PHASES`.
        providers: of `steps.PROVIDERS`; ours takes part in any case, as what the others are
            compared with.
        runtimes: of ours, of `tvkernels.runtime.BACKENDS`.
        settings: how.
        output: appended to; benchmarks/results/pipelines.jsonl if None.
        say: shows one line.
    Returns:
        The rows, each with all of `FIELDS`.
    Raises:
        ConfigError: an unknown name or number.
        VideoError: the file cannot be written.
    """
    settings = settings or Settings()
    methods = list(METHODS if methods is None else methods)
    for kind, names, known in (
        ("method", methods, METHODS), ("phase", phases, steps.PHASES),
        ("provider", providers, steps.PROVIDERS), ("runtime", runtimes, BACKENDS),
        ("dtype", [settings.dtype], models.DTYPES),
    ):  # fmt: skip
        for name in names:
            if name not in known:
                raise ConfigError(f"unknown {kind} {name!r}: use one of {', '.join(known)}")
    if any(number < 1 for number in (*frames, *itertools.chain(*(sizes or ())))):
        raise ConfigError("frames and sizes are numbers above zero")
    models.check(settings.model)
    output = ROWS if output is None else output
    found = itertools.chain.from_iterable(
        measure(method, frames, sizes, phases, providers, runtimes, settings)
        for method in dict.fromkeys(methods)
    )
    rows = []
    for row in kept(found, output):
        rows.append(row)
        say(line(row))
    return rows


def measure(
    method: str, frames, sizes, phases, providers, runtimes, settings: Settings
) -> Iterator[dict]:
    """The rows of a method."""
    pipe = models.load(method, settings.model, backend=settings.backend, dtype=settings.dtype)
    side = latent_side(pipe.unet.config) * pipe.multiple
    names = [(steps.OURS, runtime) for runtime in dict.fromkeys(("eager", *runtimes))]
    names += [(name, "eager") for name in providers if name != steps.OURS]
    weights = pipe.handle.tuned_state()
    if method == "stable-video":
        frames = (1,)  # pictures, one at a time, however many there are
    for size, count in itertools.product(sizes or ((side, side),), dict.fromkeys(frames)):
        for pixels in size:
            if pixels % pipe.multiple:
                raise ConfigError(f"size {pixels}: use multiples of {pipe.multiple} pixels")
        row = dict.fromkeys(FIELDS) | {
            "method": method, "model": settings.model, "frames": count, "size": list(size),
            "tokens": size[0] * size[1] // pipe.multiple**2, "backend": settings.backend,
            "dtype": settings.dtype,
        }  # fmt: skip
        row |= machine.facts(pipe.device)
        if weights:
            pipe.handle.load_tuned_state(weights)
        entrants = [_enter(pipe, method, *name, row) for name in names]
        clip, small = (steps.clip_of(pipe, method, n, size) for n in (count, 1))
        for entrant in entrants:
            if entrant.one is not None and entrant.row["runtime"] == "eager":
                steps.phase_call(entrant.one, small, "inversion", 1, 0)()  # caches are filled
        for phase in (name for name in steps.PHASES if name in phases):
            if phase == "tuning" and not pipe.settings.recipe.tuned:
                continue
            if weights:
                pipe.handle.load_tuned_state(weights)
                for entrant in entrants:
                    if entrant.one is not None:
                        entrant.one.load(pipe.unet.state_dict())
            yield from _measure_phase(entrants, clip, phase, pipe.settings, settings)


def _enter(pipe, method: str, provider: str, runtime: str, row: dict) -> Entrant:
    row = row | {"provider": provider, "runtime": runtime}
    try:
        one = steps.provider(pipe, method, provider, runtime)
    except steps.Unable as error:
        return Entrant(None, row | {"status": ABSENT, "reason": str(error)})
    return Entrant(one, row | {"weight_bytes": steps.weight_bytes(one)})


def _measure_phase(entrants, clip: steps.Clip, phase: str, numbers, settings: Settings):
    """The rows of a phase: every provider compared with the first, then the right ones timed."""
    whole, device = phase in steps.WHOLE, clip.latents.device
    ddim = (settings.steps or numbers.steps) if whole else (settings.steps or STEPS_A_CALL)
    tuned = ddim
    if whole:
        own = numbers.tune_steps
        tuned = own if settings.tune_steps is None or not own else settings.tune_steps
    of_method = {"tuning": numbers.tune_steps, "edit": 1, "preprocessing": 1}
    # AdamW's moments are held from the second step on: memory is that of two at least.
    trial = max(2, tuned) if phase == "tuning" else tuned
    start = clip.noise if phase in ("sampling", "edit") else clip.latents
    if phase == "tuning":
        start = entrants[0].one.invert(clip.latents, clip.told, 1)
    rows, right, base = [], [], None
    for each in entrants:
        if phase == "tuning" and each.row["runtime"] != "eager":
            continue  # it is eager under every runtime
        row = each.row | {
            "phase": phase, "steps": ddim, "date": machine.today(),
            "method_steps": of_method.get(phase, numbers.steps),
        }  # fmt: skip
        rows.append(row)
        if settings.dtype == "float16" and phase in ("tuning", "preprocessing"):
            row |= {"status": SKIPPED, "reason": "float16 cannot be tuned"}
        if row["status"] is not None:
            continue
        try:
            with meter.within_memory(device):
                call = steps.phase_call(each.one, clip, phase, ddim, trial)
                result, turns = _try(each.one, row, call, 1 if whole else trial, device)
                if phase == "tuning":
                    result = each.one.invert(clip.latents, clip.told, 1)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            row |= {"status": SKIPPED, "reason": "it takes more memory than there is"}
            kept = ("blended-diffusion", "stable-video")  # other latents, made before
            if phase in ("inversion", "sampling") and clip.method not in kept:
                row["peak_bytes"] = peak = meter.accounted_peak(each.one, clip, phase, ddim)
                row["reason"] += f": {peak / 2**30:.1f} GiB by accounting"
            if device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        base = result if base is None else base
        row |= _compared(result, base, start, phase, settings.dtype)
        if settings.resident and device.type == "cpu":
            row["resident_bytes"] = meter.resident_peak(_job(row, trial))
        if row["status"] == TIMED:
            if trial != tuned:
                call = steps.phase_call(each.one, clip, phase, ddim, tuned)
            right.append((row, call, turns))
    if whole:
        times = [turns for _, _, turns in right]
    else:
        times = take_turns([call for _, call, _ in right], device, settings.seconds)
    for (row, *_), turns in zip(right, times, strict=True):
        _fill(row, turns, times[0], 1 if whole else ddim)
    return rows


def _try(one, row: dict, call: Callable, count: int, device) -> tuple[Tensor, Turns]:
    """A first call's result, and in the row what each of its `count` steps costs beside time.

    A whole phase is timed at once, without the meters, which slow it down.
    """
    found, turns, counted = [], Turns(), meter.Meter()
    # What is compiled, captured or exported is not seen operator by operator.
    eager = row["runtime"] == "eager"

    def run():
        with counted if eager else contextlib.nullcontext():
            found.append(call())

    if not eager:
        call()  # which prepares it
    with meter.calls_of(one.unet) as calls:
        if row["phase"] in steps.WHOLE:
            turns.take(lambda: found.append(call()), device)
        else:
            row["peak_bytes"] = peak_bytes(run, device)
    if eager:
        row["unet_calls"] = calls[0] / count
    if counted.bytes:
        row |= {"flops": counted.flops // count, "bytes": counted.bytes // count}
    return found[0], turns


def _compared(result: Tensor, base: Tensor, start: Tensor, phase: str, dtype: str) -> dict:
    """How far a result is from the first provider's, as a share of the phase's own way."""
    way = (base - start).double().norm().item()
    error = (result - base).double().norm().item() / way if way else float("inf")
    limit = max(LIMITS[dtype], TUNING_LIMIT if phase in ("tuning", "preprocessing") else 0)
    if error <= limit:  # not so for NaN
        return {"status": TIMED, "error": error, "limit": limit}
    reason = f"differs from ours by {error:.1e} of the way, more than {limit:.0e}"
    return {"status": WRONG, "reason": reason, "error": error, "limit": limit}


def _fill(row: dict, turns: Turns, ours: Turns, count: int) -> None:
    """Seconds and joules of a step, and the ratio to the first provider's seconds."""
    seconds = [quantile / count for quantile in quantiles(turns.seconds)]
    row |= dict(zip(("seconds", "p20_s", "p80_s"), seconds, strict=True))
    row["samples"] = len(turns.seconds)
    ratios = ratio(turns.seconds, ours.seconds)
    row |= dict(zip(("ratio", "ratio_low", "ratio_high"), ratios, strict=True))
    if turns.joules:
        row["energy_j"] = sum(turns.joules) / len(turns.joules) / count


def _job(row: dict, tune_steps: int) -> dict:
    """What `meter.phase_once` is told."""
    names = ("method", "model", "backend", "dtype", "provider", "runtime", "phase", "frames",
             "size", "steps")  # fmt: skip
    threads = torch.get_num_threads()
    return {name: row[name] for name in names} | {"tune_steps": tune_steps, "threads": threads}


def line(row: dict) -> str:
    """One row in one line."""
    height, width = row["size"]
    head = f"{row['method']}, {row['frames']} of {width} x {height}, {row['phase']}: "
    head += row["provider"] + (f" ({row['runtime']})" if row["runtime"] != "eager" else "")
    if row["seconds"] is None:
        return f"{head}: {row['status']}: {row['reason']}"
    text = f"{head}: {row['seconds']:.3g} s, {row['ratio']:.2f} times ours"
    if row["peak_bytes"] is not None:
        text += f", {row['peak_bytes'] / 2**20:.1f} MiB"
    return text + f", error {row['error']:.0e}"
