"""One call of an op from its spec: fresh inputs, gradients, the registered calls beneath it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tvkernels._dispatch import OPS
from tvkernels.testing.spec import Maker, OpSpec, to_dtype


def build(
    spec: OpSpec,
    case: str,
    dtype: torch.dtype = torch.float32,
    *,
    wide: torch.dtype | None = None,
    seed: int = 0,
    **make,
):
    """Fresh (positional, keyword) arguments of one case, the same ones on every call.

    Args:
        dtype: precision the numbers are rounded to.
        wide: precision the rounded numbers are then kept in; None for `dtype`.
        seed: another number draws other ones.
        make: options of `Maker`: layout, extreme, device.
    """
    seed += 1000 * sum(map(ord, spec.name + case))
    args = spec.inputs(spec.cases[case], Maker(seed, dtype, **make))
    # A tensor given twice, or one that an op writes into, must not tie two calls together.
    return copied(to_dtype(args, wide or dtype))


def copied(args):
    """The same (positional, keyword) arguments in memory of their own, with the same strides."""
    positional, keyword = args
    return [_copy(x) for x in positional], {name: _copy(x) for name, x in keyword.items()}


def _copy(x):
    if not isinstance(x, Tensor):
        return x
    if 0 in x.stride():
        return x.clone()
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def tensors(result) -> list[Tensor]:
    """The tensors in a result or in arguments, flat."""
    return [x for x in tree_leaves(result) if isinstance(x, Tensor)]


def leaves(spec: OpSpec, args) -> dict[int | str, Tensor]:
    """The arguments that gradients reach in this call, by position or name."""
    positional, keyword = args
    found = {}
    for key in spec.gradients:
        x = keyword.get(key) if isinstance(key, str) else positional[key]
        if isinstance(x, Tensor):
            found[key] = x.requires_grad_()
    return found


def gradients(spec: OpSpec, args, call: Callable | None = None, **options):
    """Results, and the gradients of their sum weighted by fixed pseudo-random numbers.

    Args:
        args: as `build` gives them.
        call: what to call with them and `options`, the public function if None.
    Returns:
        The results, and position or name -> gradient; zero where none reaches an argument.
    """
    inputs = leaves(spec, args)
    results = tensors((call or spec.call)(*args[0], **args[1], **options))
    generator = torch.Generator().manual_seed(1)
    grown = [x for x in results if x.requires_grad]
    outer = [torch.randn(x.shape, generator=generator).to(torch.bfloat16).to(x) for x in grown]
    grads = torch.autograd.grad(grown, list(inputs.values()), outer, allow_unused=True)
    found = {
        name: torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(inputs.items(), grads, strict=True)
    }
    return [x.detach() for x in results], found


class RegisteredCalls(TorchDispatchMode):
    """Keeps (overload, arguments) of every tvkernels op called inside it."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "tvkernels":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def registered_arguments(spec: OpSpec, args) -> tuple:
    """The arguments that the public function hands to the registered op; no backend runs.

    Args:
        args: as `build` gives them.
    """
    positional, keyword = args
    try:
        with torch.no_grad(), _Probe(spec.name):
            spec.call(*positional, **keyword)
    except _Reached as reached:
        return reached.args[0]
    raise RuntimeError(f"{spec.name} never reached its registered op")


class _Reached(Exception):
    """Carries the arguments of the call that a probe waited for."""


class _Probe(TorchDispatchMode):
    """Stops at the call of one registered op, before a backend is chosen."""

    def __init__(self, name: str):
        super().__init__()
        self.overload = OPS[name].overload

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is self.overload:
            raise _Reached(args[:-1])  # without the name of the backend
        return function(*args, **(kwargs or {}))
