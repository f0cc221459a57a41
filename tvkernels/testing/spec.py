"""The specification of an op: named cases, inputs, cost, error budget. All tests read it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class OpSpec:
    """What tests, benchmarks and offline gates need to know of an op.

    Args:
        name: folder in `tvkernels.ops` and name of the public function.
        cases: case name -> parameters that `inputs` understands. Real UNet shapes start with
            "sd" and are for benchmarks and offline kernel gates; all others are small and run in
            every test.
        inputs: (parameters, make) -> (positional, keyword) arguments of the public function, where
            make(*shape, like=...) returns a fresh random tensor of the case's dtype and device.
        flops, bytes, exps: parameters -> count; bytes for an element size of 2 unless given.
        case_of: the registered call's arguments -> parameters, so that a profile can count a call;
            None where no case is like it.
        gradients: names or positions of arguments that gradients reach, () for none.
        budget, gradient_budget: factors of the error budgets of results and gradients; a value
            other than 2 needs its reason beside it.
        function: the public function; by default found by its name.
    """

    name: str
    cases: Mapping[str, Mapping[str, Any]]
    inputs: Callable
    flops: Callable[[Mapping[str, Any]], int]
    bytes: Callable[[Mapping[str, Any]], int]
    case_of: Callable[..., Mapping[str, Any] | None]
    exps: Callable[[Mapping[str, Any]], int] = field(default=lambda case: 0)
    gradients: tuple[int | str, ...] = ()
    budget: float = 2.0
    gradient_budget: float = 2.0
    function: Callable | None = None

    @property
    def call(self) -> Callable:
        """The public function."""
        return self.function or getattr(importlib.import_module("tvkernels"), self.name)

    @property
    def small_cases(self) -> list[str]:
        """Cases that fit in a test on two cores."""
        return [name for name in self.cases if not name.startswith("sd")]

    @property
    def real_cases(self) -> list[str]:
        """Cases of real UNets' shapes."""
        return [name for name in self.cases if name.startswith("sd")]


def sizes(names: str, x: Tensor) -> dict[str, int]:
    """The tensor's sizes by one letter each."""
    return dict(zip(names, x.shape, strict=True))


class Maker:
    """Fresh random tensors from a seed: normal, of one dtype on one device.

    Args:
        layout: "dense", or "permuted" for tensors whose memory order is not their index order and
            vectors whose elements lie apart.
        extreme: "" for normal values, "equal" for all scores alike, "huge" for one huge value.
    """

    def __init__(
        self,
        seed: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        layout: str = "dense",
        extreme: str = "",
    ):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device, self.layout, self.extreme = dtype, device, layout, extreme

    def __call__(
        self, *shape: int, scale: float = 1.0, positive: bool = False, plain: bool = False
    ) -> Tensor:
        """A random tensor [*shape] of standard deviation `scale`, or uniform in [0, 1].

        A `plain` one, such as a weight, is never made extreme: a product of two huge values leaves
        float16 in the yardstick too.
        """
        draw = torch.rand if positive else torch.randn
        x = draw(shape, generator=self.generator, dtype=torch.float64) * scale
        if self.extreme == "equal" and not plain:
            x = torch.full_like(x, 0.5 * scale)
        if self.extreme == "huge" and x.numel() and not (positive or plain):
            x.view(-1)[x.numel() // 2] = 100.0 * scale
        x = x.to(self.dtype)  # rounded first, so that every precision sees the same numbers
        x = x.to(self.device)
        if self.layout == "permuted" and x.dim() == 1:
            x = x.repeat_interleave(2)[::2]
        elif self.layout == "permuted" and x.dim():
            x = x.movedim(0, -1).contiguous().movedim(-1, 0)
        return x


def to_dtype(args, dtype: torch.dtype):
    """The same (positional, keyword) arguments with narrower floating tensors in `dtype`."""
    positional, keyword = args

    def cast(x):
        if isinstance(x, Tensor) and x.is_floating_point() and x.element_size() < dtype.itemsize:
            return x.to(dtype)
        return x  # never narrowed: an op may ask for float32 beside half inputs

    return [cast(x) for x in positional], {name: cast(x) for name, x in keyword.items()}
