"""`tvk profile`: where the time of a method goes, by op, by layer and by phase, beside its limit.

Four passes over the same work: one prepares, one is timed, one counts what every operator does,
one runs under torch.profiler. The last two meet in groups of (phase, layer, operator).
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from tvkernels import _ranges
from tvkernels.benchmarks import machine
from tvkernels.benchmarks.limits import measure_rates
from tvkernels.benchmarks.profiling.counts import Counting, Group
from tvkernels.benchmarks.timing import quiet
from tvkernels.config import EMBEDDED, ConfigError
from tvkernels.demo import MODEL_DIR
from tvkernels.demo.settings import method_numbers
from tvkernels.demo.world import edit_pair
from tvkernels.pipelines import METHODS
from tvkernels.pipelines.checks import check_model, model_size
from tvkernels.pipelines.common import decode_latents
from tvkernels.pipelines.loading import load_pipeline
from tvkernels.record import write_json
from tvkernels.runtime import BACKENDS, accelerate, why_not
from tvkernels.video import atomic_path, check_output

PHASES = ("tune", "invert", "sample", "decode")
TRACE, TABLES = "trace.json.gz", "profile.json"
EVALUATE = "autograd::engine::evaluate_function"


@dataclass(frozen=True)
class ProfileSettings:
    """What is profiled.

    Args:
        output: a folder.
        method: a name of `tvkernels.pipelines.METHODS`.
        phases: of `PHASES`; all that the method has if empty.
        model: a Stable Diffusion 1.x directory, a hub name, or "embedded".
        frames: None takes the method's.
        size: pixels of the square picture; None takes the model's.
        runtime: what inversion and sampling run under.
        steps: of each phase.
    """

    output: Path
    method: str = "ei2"
    phases: tuple[str, ...] = ()
    model: str = EMBEDDED
    frames: int | None = None
    size: int | None = None
    runtime: str = "eager"
    steps: int = 1


def profile(given: ProfileSettings, say: Callable[[str], None] = lambda text: None) -> dict:
    """Profiles a method and writes the trace and the tables.

    Args:
        given: settings.
        say: shows one line to the user.
    Returns:
        What profile.json holds: the settings, "phases", "ops" and "layers", the longest first, the
        "largest_gap" to the limit (None where none is known), rates and facts of the machine.
        Seconds are of the pass under torch.profiler; "profiler_ratio" is that pass against the
        timed one.
    Raises:
        ConfigError, ModelError, VideoError: before any work of weight has begun.
    """
    size = check(given)
    with _ranges.on():  # from the start: switched later, what was compiled is compiled again
        device, run, pipe, frames = prepare(given, size)
        rates = measure_rates(device, pipe.unet.dtype)
        say("a first pass prepares, a second is timed, a third counted, a fourth profiled")
        run()
        plain = _seconds(run, device)
        groups = count(pipe, run, rates)
        whole, events, profiler = record(run, device)
    phases = attribute(events, groups, device)
    report = asdict(given) | {
        "output": str(given.output), "frames": frames, "size": size, "dtype": str(pipe.unet.dtype),
        "whole_s": whole, "profiler_ratio": whole / plain,
    }  # fmt: skip
    report |= tables(groups, phases, whole) | {"rates": asdict(rates)}
    report |= machine.facts(device) | {"date": machine.today()}
    with atomic_path(given.output / TRACE) as temporary:
        profiler.export_chrome_trace(str(temporary))
    write_json(given.output / TABLES, report)
    return report


def check(given: ProfileSettings) -> int:
    """What can be wrong without loading the model; the picture's side in pixels.

    Raises:
        ConfigError, ModelError, VideoError: one line that says what to do.
    """
    asked = [("method", given.method, METHODS), ("runtime", given.runtime, BACKENDS)]
    for name, value, known in asked + [("phase", phase, PHASES) for phase in given.phases]:
        if value not in known:
            raise ConfigError(f"unknown {name} {value!r}: use one of {', '.join(known)}")
    for file in (TRACE, TABLES):
        check_output(given.output / file, (Path(file).suffix,))
    reasons = why_not(given.runtime, _device().type)
    if reasons:
        raise ConfigError(f"the runtime {given.runtime} cannot run here: {'; '.join(reasons)}")
    if given.model != EMBEDDED:
        check_model(given.model)
    largest, multiple = model_size(_model(given))
    size = given.size or largest
    if size % multiple:
        raise ConfigError(f"size {size}: sides must be multiples of {multiple}")
    return size


def prepare(given: ProfileSettings, size: int) -> tuple:
    """The device, a function that runs the phases once, the pipeline and the number of frames.

    Raises:
        ConfigError: a phase that the method does not have.
    """
    numbers, _ = method_numbers(given.method, given.model == EMBEDDED)
    apart = hasattr(numbers, "atlas")  # such a method inverts and decodes as it samples
    having = ("sample",) if apart else PHASES[not numbers.recipe.tuned :]
    phases = given.phases or having
    if strange := set(phases) - set(having):
        raise ConfigError(
            f"{given.method} has no phase {sorted(strange)[0]!r} of its own: "
            f"use {', '.join(having)}"
        )
    frames = given.frames or numbers.frames
    source, target = edit_pair(0, num_frames=frames)
    clip, fitting = source.render(size, size), {}
    if apart:  # an atlas that is hardly trained costs as much to edit
        numbers = replace(numbers, atlas=replace(numbers.atlas, steps=1))
        fitting["masks"] = clip.masks[None] > 0.5
    pipe = load_pipeline(given.method, str(_model(given)), settings=numbers)
    pipe.set_progress_bar_config(disable=True)
    pipe.fit(clip.frames, source.caption, num_steps=0, **fitting)
    pipe.accelerate(given.runtime)
    latents = pipe._encode_video(clip.frames, frames)
    if "sample" in phases and "invert" not in phases:
        pipe.invert(clip.frames, num_inference_steps=given.steps)
    sampling = {
        "num_inference_steps": given.steps, "output_type": "pt" if pipe.in_pixels else "latent",
        "split_guidance": given.runtime in ("compile", "aoti"),  # as `tvk edit`
    }  # fmt: skip

    def run() -> None:
        if "tune" in phases:
            rate = numbers.learning_rate
            text = pipe._encode_prompts([source.caption])
            pipe._tune(latents, text, given.steps, rate, torch.Generator())
            pipe.handle.settle()  # as `fit` does
        if "invert" in phases:
            pipe.invert(clip.frames, num_inference_steps=given.steps)
        if "sample" in phases:
            pipe(target.caption, **sampling)
        if "decode" in phases:
            decode_latents(pipe.vae, latents)

    return pipe._execution_device, run, pipe, frames


def count(pipe, run: Callable[[], None], rates) -> dict[tuple[str, str, str], Group]:
    """(phase, layer, operator) -> what eager PyTorch does there.

    Eager under every runtime: it is the same work, and a runtime's own code shows no operators.
    """
    kept, pipe.runner = pipe.runner, accelerate(pipe.unet)
    try:
        with Counting(rates) as counting:
            run()
    finally:
        pipe.runner = kept
    return counting.groups


def record(run: Callable[[], None], device: torch.device) -> tuple:
    """Seconds of a run under torch.profiler, its events and the profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with quiet(), torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        seconds = _seconds(run, device)
    return seconds, profiler.events(), profiler


def attribute(events: Iterable, groups: dict, device: torch.device) -> dict[str, float]:
    """Adds every operator's seconds to its group; phase -> seconds.

    A device's seconds are those of the kernels that an operator has started. The backward of a
    node belongs to the layer that made it, which its number tells.
    """
    counted = {operator for *_, operator in groups}
    on_host = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    ranges = [(e.time_range, _range(e.name)[1]) for e in on_host if _range(e.name)[0] == "method"]
    phases, layer_of = Counter(), {}
    for time_range, phase in ranges:
        phases[phase] += time_range.elapsed_us() / 1e6

    def visit(event, phase: str | None, layer: str) -> None:
        kind, name = _range(event.name)
        phase, layer = name if kind == "method" else phase, name if kind == "layer" else layer
        if event.name.startswith(EVALUATE):
            layer = layer_of.get(event.sequence_nr, layer)
        elif event.sequence_nr >= 0:
            layer_of[event.sequence_nr] = layer
        if phase is not None and event.name in counted:
            whole = event.device_time_total if device.type == "cuda" else event.cpu_time_total
            groups[phase, layer, event.name].seconds += whole / 1e6
            return
        for child in event.cpu_children:
            visit(child, phase, layer)

    for root in sorted((e for e in on_host if e.cpu_parent is None), key=_start):
        inside = (p for r, p in ranges if r.start <= _start(root) < r.end)  # of another thread
        visit(root, next(inside, None), "")
    return dict(phases)


def tables(groups: dict, phases: dict[str, float], whole: float) -> dict:
    """ "phases", "ops", "layers" and "largest_gap" of profile.json, the longest rows first."""
    by = [defaultdict(list) for _ in range(3)]
    places = defaultdict(list)
    for (phase, layer, operator), group in groups.items():
        for table, name in zip(by, (phase, layer, operator), strict=True):
            table[name].append(group)
        places[phase, operator].append((layer, group))
    ops = [row(Group.of(parts), op=name) for name, parts in by[2].items()]
    layers = [row(Group.of(parts), layer=name or "none") for name, parts in by[1].items()]
    parts = []
    for name, seconds in phases.items():
        found = row(Group.of(by[0][name]), phase=name)
        found |= {"operators_s": found["seconds"], "seconds": seconds}
        parts.append(found | _against(found["limit_s"], seconds))
    gaps = []
    for (phase, operator), where in places.items():
        total = row(Group.of(group for _, group in where), phase=phase, op=operator)
        worst = max(where, key=lambda pair: pair[1].seconds - pair[1].limit_s)
        if total["gap_s"] is not None:
            gaps.append(total | {"layer": worst[0] or "none"})
    return {
        "phases": parts, "outside_s": whole - sum(phases.values()),
        "ops": sorted(ops, key=_longest), "layers": sorted(layers, key=_longest),
        "largest_gap": max(gaps, key=lambda gap: gap["gap_s"], default=None),
    }  # fmt: skip


def row(group: Group, **names: str) -> dict:
    """A line of a table; the limit is None where a call of it is not known."""
    limit_s = group.limit_s if group.known and group.calls else None
    bound = max(group.bounds, key=group.bounds.get, default=None)
    return names | {
        "calls": group.calls, "seconds": group.seconds, "bytes": group.bytes,
        "flops": group.flops, "exps": group.exps, "limit_s": limit_s, "bound": bound,
    } | _against(limit_s, group.seconds)  # fmt: skip


def _against(limit_s: float | None, seconds: float) -> dict:
    if limit_s is None or not seconds:
        return {"percent_of_limit": None, "gap_s": None}
    return {"percent_of_limit": 100 * limit_s / seconds, "gap_s": seconds - limit_s}


def _longest(found: dict) -> float:
    return -found["seconds"]


def _range(title: str) -> tuple[str, str]:
    """Kind and name of one of our ranges."""
    domain, _, rest = title.partition("/")
    kind, _, name = rest.partition("/")
    return (kind, name) if domain == _ranges.DOMAIN and kind in _ranges.KINDS else ("", "")


def _start(event) -> float:
    return event.time_range.start


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _model(given: ProfileSettings) -> str | Path:
    return MODEL_DIR if given.model == EMBEDDED else given.model


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
