"""Right or wrong, before any time is taken: results against the reference in float64."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tvkernels.testing.budget import error_and_budget
from tvkernels.testing.calls import copied, leaves, tensors
from tvkernels.testing.spec import OpSpec, to_dtype

# Ops whose heads and clips do not meet, so that one head of one clip is a call of its own.
BY_HEAD = ("frame_attention", "temporal_attention")
WHOLE, ONE_HEAD = "whole", "one head of one clip"


@dataclass
class Truth:
    """What a call must give, and what plain PyTorch gives at its dtype."""

    exact: list[Tensor]
    low: list[Tensor]
    part: str  # WHOLE or ONE_HEAD
    factor: float
    backward: bool = False


@dataclass(frozen=True)
class Verdict:
    """Error and budget of the result that came nearest to its budget."""

    error: float | None
    budget: float | None
    fault: str | None = None  # a result that has no error: wrong shape, not finite

    @property
    def right(self) -> bool:
        """Within the budget."""
        return self.fault is None and self.error <= self.budget


def truth(spec: OpSpec, args, *, backward: bool = False, whole: bool = True) -> Truth:
    """The reference in float64 and at the arguments' own dtype, on their device.

    Args:
        args: (positional, keyword) arguments of the public function.
        backward: of the gradients instead of the results.
        whole: False, or too little memory, takes one head of one clip where the op allows it.
    Raises:
        torch.OutOfMemoryError: nor does a part fit.
    """
    outer = outer_gradients(spec, args) if backward else None
    if whole:
        try:
            return _truth(spec, args, outer, WHOLE)
        except torch.OutOfMemoryError:
            if spec.name not in BY_HEAD:
                raise
            torch.cuda.empty_cache()
    return _truth(spec, *part(spec, args, outer), ONE_HEAD)


def _truth(spec: OpSpec, args, outer, part: str) -> Truth:
    found = []
    for wide in (torch.float64, None):
        given = copied(args if wide is None else to_dtype(args, wide))

        def reference(given=given):
            return spec.call(*given[0], **given[1], backend="reference")

        if outer is None:
            with torch.no_grad():
                found.append(tensors(reference()))
        else:
            found.append(differentiate(spec, given, reference, outer))
    if outer is None:
        return Truth(*found, part, spec.budget)
    return Truth(*found, part, spec.gradient_budget, backward=True)


def part(spec: OpSpec, args, outer=None):
    """One head of one clip of the arguments, and of gradients that come from outside."""
    if spec.name not in BY_HEAD:
        raise ValueError(f"{spec.name} has no part that is a call of its own")
    positional, keyword = args
    cut = [_one_head(x) if isinstance(x, Tensor) else x for x in positional]
    return (cut, keyword), None if outer is None else [_one_head(x) for x in outer]


def _one_head(x: Tensor) -> Tensor:
    """Of [B, F, N, H, D] or [B, F, N, H]."""
    return x[:1, :, :, :1]


def outer_gradients(spec: OpSpec, args) -> list[Tensor]:
    """Fixed pseudo-random gradients of the results, exact in every dtype."""
    with torch.no_grad():
        shapes = tensors(spec.call(*args[0], **args[1], backend="cpu"))
    generator = torch.Generator(shapes[0].device).manual_seed(1)
    return [
        torch.randn(x.shape, generator=generator, device=x.device).to(torch.bfloat16).to(x)
        for x in shapes
    ]


def differentiate(spec: OpSpec, args, call: Callable, outer: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of what `call` gives, weighted by `outer`, in the arguments of `spec.gradients`.

    Args:
        args: those `call` uses; their leaves are made to require gradients.
    """
    inputs = list(leaves(spec, args).values())
    results = [(x, g) for x, g in zip(tensors(call()), outer, strict=False) if x.requires_grad]
    found = torch.autograd.grad(
        [x for x, _ in results], inputs, [g.to(x) for x, g in results], allow_unused=True
    )
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def judge(actual: Sequence[Tensor], truth: Truth, *, only_first: bool = False) -> Verdict:
    """Compares results with the truth.

    Args:
        only_first: the caller gives the first result alone, as a rival without the others does.
    """
    expected = 1 if only_first else len(truth.exact)
    if len(actual) != expected:
        return Verdict(None, None, f"{len(actual)} results, expected {expected}")
    worst = Verdict(0.0, 0.0)
    for i, x in enumerate(actual):
        x = _one_head(x) if truth.part == ONE_HEAD else x
        try:
            found = error_and_budget(
                x, truth.low[i], truth.exact[i], factor=truth.factor, what=f"result {i}"
            )
        except AssertionError as fault:
            return Verdict(None, None, str(fault))
        if truth.backward and not found[1]:
            found = found[0], truth.factor * _step_of_largest(truth)
        worst = max(worst, Verdict(*found), key=_share)
    return worst


def _step_of_largest(truth: Truth) -> float:
    """One rounding step of the call's largest gradient: what there is to measure a gradient by
    that is zero in exact arithmetic, as of the scores where a frame reads itself alone.
    """
    steps = [
        torch.finfo(low.dtype).eps * exact.abs().max().item()
        for low, exact in zip(truth.low, truth.exact, strict=True)
        if exact.numel()
    ]
    return max(steps, default=0.0)


def _share(verdict: Verdict) -> float:
    """Of the budget that is spent."""
    if not verdict.error:
        return 0.0
    return verdict.error / verdict.budget if verdict.budget else math.inf


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """`torch.empty` gives NaN, so that a value never written is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    before_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operations that have no deterministic form
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=before_warn)


def leave_nan(shapes: Sequence[Tensor]) -> None:
    """Frees memory of these sizes full of NaN, which the allocator hands out next."""
    kept = [torch.full_like(x, torch.nan) for x in shapes if x.is_floating_point()]
    del kept


def differing_runs(call: Callable[[], Sequence[Tensor]], runs: int) -> int:
    """How many of `runs` calls gave other bits than the first one: a race, most likely."""
    first = [_bits(x) for x in call()]
    differ = 0
    for _ in range(runs - 1):
        again = [_bits(x) for x in call()]
        differ += not all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    return differ


def _bits(x: Tensor) -> Tensor:
    """NaN included, which equals nothing."""
    return x.contiguous().view(torch.uint8) if x.dim() else x.reshape(1).view(torch.uint8)
