"""Calls of seconds each, taken in turns, and what one takes in units of another.

`timing.interleave` is for calls of micro- and milliseconds: it wants nine calls before it trusts
one, which for a step of a tuning is minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tvkernels.benchmarks.edits.meter import joules

FEWEST, MOST = 2, 60  # rounds, even numbers so that A-B-B-A closes
RESAMPLES = 2000


@dataclass
class Turns:
    """Samples of one call, by round.

    Args:
        seconds: host clock, the device waited for.
        joules: what the device took, empty where nothing tells it.
    """

    seconds: list[float] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)

    def take(self, call: Callable, device: torch.device) -> None:
        """One more sample."""
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
        wait(device)
        energy, start = joules(device), time.perf_counter()
        call()
        wait(device)
        self.seconds.append(time.perf_counter() - start)
        if energy is not None:
            self.joules.append(joules(device) - energy)


def take_turns(calls: Sequence[Callable], device: torch.device, seconds: float) -> list[Turns]:
    """Samples of every call, A-B-B-A: each round takes them in the other order.

    Args:
        calls: each has run before.
        device: where they run.
        seconds: aimed at for each call; never fewer than `FEWEST` rounds nor more than `MOST`.
    """
    found = [Turns() for _ in calls]
    end = time.monotonic() + seconds * len(calls)
    for number in range(MOST if calls else 0):
        if number >= FEWEST and number % 2 == 0 and time.monotonic() > end:
            break
        pairs = list(zip(found, calls, strict=True))
        for turns, call in pairs if number % 2 == 0 else reversed(pairs):
            turns.take(call, device)
    return found


def ratio(ones: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Mean of ones / others by rounds, geometric, and its 95 % interval by the bootstrap.

    Two rounds give as their interval the two ratios.
    """
    logs = np.log(np.asarray(ones) / np.asarray(others))
    picks = np.random.default_rng(0).integers(len(logs), size=(RESAMPLES, len(logs)))
    low, high = np.percentile(logs[picks].mean(1), [2.5, 97.5])
    return tuple(float(np.exp(x)) for x in (logs.mean(), low, high))
