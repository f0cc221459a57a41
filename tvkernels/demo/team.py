"""Data-parallel training on one machine: one single-threaded process per core.

Measured on 2 cores shared with other work: a process of two threads waits at every operator's
barrier for a core that is busy elsewhere and slows down up to twentyfold; single-threaded
processes that meet once per step lose only the share of the core that is taken.
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def launch(function: Callable[..., None], workers: int, *arguments) -> None:
    """Runs `function(team, *arguments)` in `workers` processes and waits for all of them."""
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        mp.spawn(_enter, (workers, store, function, arguments), nprocs=workers)


def _enter(rank: int, workers: int, store: str, function, arguments) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=workers)
    try:
        function(Team(rank, workers), *arguments)
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Team:
    """This process's place among the workers."""

    rank: int
    size: int

    @property
    def leads(self) -> bool:
        """Whether this process logs and saves."""
        return self.rank == 0

    def average(self, tensors: Sequence[torch.Tensor], number: float = 0.0) -> float:
        """Averages tensors over all workers in place; returns the average of a number."""
        flat = torch.cat([*(tensor.reshape(-1) for tensor in tensors), torch.tensor([number])])
        dist.all_reduce(flat)
        flat /= self.size
        parts = flat.split([*(tensor.numel() for tensor in tensors), 1])
        for tensor, part in zip(tensors, parts, strict=False):
            tensor.copy_(part.view_as(tensor))
        return float(parts[-1])


@dataclass
class Progress:
    """A stage's budget of wall-clock seconds, which its learning rate follows."""

    name: str
    budget: float
    log: Path
    share: float = 0.0
    start: float = field(default_factory=time.time)
    saved: float = field(default_factory=time.time)

    @property
    def seconds(self) -> float:
        """Seconds since the stage began."""
        return time.time() - self.start

    def learning_rate(self, peak: float, warm_up: float = 0.02) -> float:
        """Linear warm-up, then a cosine down to 1 % of the peak."""
        if self.share < warm_up:
            return peak * max(self.share / warm_up, 0.02)
        part = min(1.0, (self.share - warm_up) / (1 - warm_up))
        return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * part)))

    def say(self, text: str) -> None:
        """Prints a line and appends it to the log."""
        line = f"{self.name} {self.seconds:6.0f} s  {text}"
        print(line, flush=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def due(self, every: float) -> bool:
        """Whether `every` seconds passed since the last checkpoint; resets the clock if so."""
        if time.time() - self.saved < every:
            return False
        self.saved = time.time()
        return True


class Trainer:
    """AdamW over one or more modules, with averaged gradients and averaged weights.

    Attributes:
        averages: exponential moving averages of the modules, for evaluation and saving.
    """

    def __init__(self, team: Team, modules: Sequence[torch.nn.Module], rate: float, decay: float):
        self.team, self.rate, self.decay, self.steps = team, rate, decay, 0
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        team.average([p.data for p in self.parameters])
        self.averages = [copy.deepcopy(module).eval().requires_grad_(False) for module in modules]
        self._averaged = [
            mine
            for module, average in zip(modules, self.averages, strict=True)
            for mine, theirs in zip(average.parameters(), module.parameters(), strict=True)
            if theirs.requires_grad
        ]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.0, foreach=True
        )

    def step(self, loss: torch.Tensor, progress: Progress) -> None:
        """One step; `progress.share` becomes the workers' common share of the budget."""
        loss.backward()
        gradients = []
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        progress.share = self.team.average(gradients, progress.seconds / progress.budget)
        for group in self.optimizer.param_groups:
            group["lr"] = progress.learning_rate(self.rate)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        keep = min(self.decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(self._averaged, self.parameters, 1 - keep)
