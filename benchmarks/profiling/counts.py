"""What every operator of a run reads, writes and computes, and the least time that takes.

Ours are counted by their specs, torch's products and convolutions by torch's own formulas, what
else torch calls by the bytes of its tensors.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from tvkernels import _ranges
from tvkernels.benchmarks.limits import Rates
from tvkernels.ops import specs
from tvkernels.testing.calls import tensors

BACKWARD = "_backward"
ALLOCATIONS = ("empty", "new_empty")
OVERWRITES = ("copy_", "fill_", "zero_")  # do not read what they write
EXPONENTIALS = ("_softmax", "exp", "gelu", "sigmoid", "silu", "tanh")  # one an element
ATTENTION = "_scaled_dot_product"


@dataclass(frozen=True)
class Work:
    """Of one call."""

    bytes: int = 0
    flops: int = 0
    exps: int = 0

    def least(self, rates: Rates) -> tuple[float, str]:
        """Seconds that it takes at least, and what takes them."""
        times = {
            "bytes": self.bytes / rates.copied_bytes,
            "flops": self.flops / rates.flops,
            "exps": self.exps / rates.exps,
        }
        bound = max(times, key=times.get)
        return times[bound], bound


def work(function, args: tuple, kwargs: dict, out: Any) -> Work | None:
    """Of a call that torch's dispatcher saw, or None where that is not known."""
    if function.namespace == "tvkernels":
        return _of_ours(function._schema.name.partition("::")[2], args)
    name, flops = function._overloadpacket.__name__, 0
    made, given = tensors(out), tensors((args, kwargs))
    if not function._schema.is_mutable:
        places = {_place(x) for x in given}
        made = [x for x in made if _place(x) not in places]
    if name.startswith(ALLOCATIONS) or not made:
        return Work()  # memory taken, or a view
    read = given[name in OVERWRITES :]
    moved = sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in (*read, *made))
    if function._overloadpacket in flop_registry:
        flops = flop_registry[function._overloadpacket](*args, **kwargs, out_val=out)
    exps = made[0].numel() * (name.rstrip("_") in EXPONENTIALS)
    if name.startswith(ATTENTION) and not name.endswith(BACKWARD):
        q, k, v = (x.shape for x in args[:3])
        flops, exps = sdpa_flop_count(q, k, v), math.prod(q[:-1]) * k[-2]
    return Work(moved, flops, exps)


def _place(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _of_ours(name: str, args: tuple) -> Work | None:
    """By the op's spec; a backward alone as `limits.limit` counts it."""
    backward = name.endswith(BACKWARD)
    spec = specs()[name.removesuffix(BACKWARD)]
    args = args[1:-1] if backward else args[:-1]  # without outer gradients and the backend's name
    case = spec.case_of(*args)
    if case is None:
        return None
    size = next(x for x in args if isinstance(x, Tensor)).element_size() / 2
    flops, exps = spec.flops(case), spec.exps(case)
    return Work(int(spec.bytes(case) * size), flops * (1 + backward), exps * (not backward))


def _as_called(function) -> AbstractContextManager:
    """A mode leaves autograd out of what it calls; our backwards recompute with its help."""
    if function.namespace != "tvkernels" or not function._schema.name.endswith(BACKWARD):
        return nullcontext()
    nothing = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), nothing)


@dataclass
class Group:
    """All calls of one operator in one layer and phase."""

    calls: int = 0
    bytes: int = 0
    flops: int = 0
    exps: int = 0
    limit_s: float = 0.0
    known: bool = True  # whether all its calls were counted
    bounds: Counter = field(default_factory=Counter)  # what sets the limit -> seconds of it
    seconds: float = 0.0

    @classmethod
    def of(cls, parts: Iterable[Group]) -> Group:
        """Several as one."""
        total = cls()
        for part in parts:
            for name in ("calls", "bytes", "flops", "exps", "limit_s", "seconds"):
                setattr(total, name, getattr(total, name) + getattr(part, name))
            total.known &= part.known
            total.bounds += part.bounds
        return total

    def add(self, found: Work | None, rates: Rates) -> None:
        """One more call."""
        self.calls += 1
        if found is None:
            self.known = False
            return
        least, bound = found.least(rates)
        self.bytes += found.bytes
        self.flops += found.flops
        self.exps += found.exps
        self.limit_s += least
        self.bounds[bound] += least


class Counting(TorchDispatchMode):
    """Inside, with ranges on, every operator is counted where it is called.

    Attributes:
        groups: (phase, layer, operator) -> `Group`.
    """

    def __init__(self, rates: Rates):
        super().__init__()
        self.rates = rates
        self.groups: dict[tuple[str, str, str], Group] = defaultdict(Group)
        self._layer_of: dict[int, str] = {}  # autograd node's number -> layer

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        open_now = dict(_ranges.path())
        phase, layer = open_now.get("method"), open_now.get("layer", "")
        node = torch._C._current_autograd_node()
        if node is not None:
            layer = self._layer_of.get(node._sequence_nr(), layer)
        elif torch.is_grad_enabled():
            # The node that the call adds to the graph has its number already.
            self._layer_of.setdefault(torch.autograd._get_sequence_nr() - 1, layer)
        with _as_called(function):
            out = function(*args, **kwargs)
        if phase is not None and function.namespace != "profiler":
            found = work(function, args, kwargs, out)
            self.groups[phase, layer, function._schema.name].add(found, self.rates)
        return out
