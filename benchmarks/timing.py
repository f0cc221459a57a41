"""Times of calls that take turns, on cold caches; and the memory that one call takes.

On a GPU a candidate is a captured graph of one call for each set of inputs, or where its calls
cannot be captured, single calls between device events. The sets are together larger than L2. On a
CPU it is single calls on the host's clock.
"""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import DeviceType

from tvkernels.benchmarks.machine import sm_clock

WARM_UP = 3
FEWEST, MOST = 6, 100  # rounds, even numbers so that A-B-B-A closes


@dataclass
class Candidate:
    """One thing to time: the same call on several sets of inputs."""

    name: str
    calls: Sequence[Callable[[], Any]]
    capturable: bool = True


@dataclass
class Times:
    """Seconds of one call: median, 20th and 80th percentile, and how they were taken."""

    how: str  # "graph", "events" or "host clock"
    median_s: float
    p20_s: float
    p80_s: float
    samples: int
    note: str | None = None  # why it was not a graph
    sm_clock_mhz: int | None = None


@dataclass
class _Sweep:
    """All calls of a candidate once, as something that gives samples in seconds."""

    run: Callable[[], list[float]]
    how: str
    note: str | None = None
    samples: list[float] = field(default_factory=list)


def interleave(
    candidates: Sequence[Candidate], device: torch.device, seconds: float = 0.3
) -> list[Times]:
    """Times of every candidate, A-B-B-A: each round takes them in the other order.

    Args:
        candidates: warmed up here; each call must have run before.
        device: where they run.
        seconds: aimed at for each candidate; never fewer than `FEWEST` rounds.
    """
    sweeps = [_sweep(c, device) for c in candidates]
    round_s = sum(min(_host(sweep.run) for _ in range(2)) for sweep in sweeps)
    rounds = int(seconds * len(sweeps) / max(round_s, 1e-9)) // 2 * 2
    rounds = min(max(rounds, FEWEST), MOST)
    for number in range(rounds):
        for sweep in sweeps if number % 2 == 0 else reversed(sweeps):
            sweep.samples += sweep.run()
    clock = _clock_under_load(sweeps, device)
    return [Times(s.how, *quantiles(s.samples), len(s.samples), s.note, clock) for s in sweeps]


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    if len(samples) == 1:
        return (samples[0],) * 3
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return statistics.median(samples), tenths[1], tenths[7]


def seconds_of(call: Callable[[], Any], device: torch.device, repeats: int = 10) -> float:
    """Least seconds of one call by itself: the rates of a machine are what it can do at most."""
    sweep = _sweep(Candidate("", [call], capturable=False), device)
    return min(s for _ in range(repeats) for s in sweep.run())


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most memory that one call holds at a time beyond what is held before it."""
    gc.collect()  # older garbage that is freed meanwhile would count against the call
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = call()
        torch.cuda.synchronize(device)
        del kept
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with quiet(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = call()
    del kept
    now = most = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.device_type() == DeviceType.CPU:
            now += event.nbytes()
            most = max(most, now)
    return most


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing on standard error: the profiler tells its stages there, and the variable that stops
    it is read when torch is imported.
    """
    kept = os.dup(2)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _sweep(candidate: Candidate, device: torch.device) -> _Sweep:
    for _ in range(WARM_UP):
        for call in candidate.calls:
            call()
    if device.type != "cuda":
        return _Sweep(lambda: [_host(call) for call in candidate.calls], "host clock")
    torch.cuda.synchronize(device)
    note = "not captured: it reads on the host, or its graph would fill the memory"
    if candidate.capturable:
        stream = torch.cuda.current_stream(device)
        try:
            return _Sweep(_graph(candidate.calls, device), "graph")
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a capture that fails at its end leaves its own behind
            torch.cuda.synchronize(device)
            note = f"not captured: {str(error).splitlines()[0]}"
    return _Sweep(lambda: _events(candidate.calls, device), "events", note)


def _host(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _graph(calls: Sequence[Callable], device: torch.device) -> Callable[[], list[float]]:
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool):
            # Kept until all are captured: results that shared one place would stay in L2.
            kept = [call() for call in calls]
    except Exception:
        # torch 2.11 leaves the allocator capturing, and then no other capture can begin.
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(side.device.index, pool)
        raise
    del kept

    def replay() -> list[float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return [start.elapsed_time(end) / 1e3 / len(calls)]

    replay()
    return replay


def _events(calls: Sequence[Callable], device: torch.device) -> list[float]:
    marks = []
    for call in calls:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in marks]


def _clock_under_load(sweeps: Sequence[_Sweep], device: torch.device) -> int | None:
    """The clock is read as soon as the device has worked: idle, it falls within milliseconds."""
    if device.type != "cuda" or not sweeps:
        return None
    sweeps[0].run()
    return sm_clock(device)
