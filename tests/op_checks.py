"""An op's results and gradients against float64, as every backend's tests compare them."""

import itertools
from collections import Counter
from functools import cache

import pytest
import torch

from tvkernels.ops import specs
from tvkernels.testing.budget import assert_error_budget
from tvkernels.testing.calls import build, gradients, tensors

SPECS = specs()


def product(items, *axes, quick):
    """pytest's parameters: every item with every value of each axis, most of them slow.

    Args:
        items: (op, case) or (op, case, backend).
        quick: (which of its op's and backend's items, which value of each axis) -> whether the
            quick suite takes it. Each of its op's cases comes, and each pair of axes with it, in
            turns; `make test-slow` takes the rest.
    """
    seen, found = Counter(), []
    for op, case, *backend in items:
        turn = seen[op, *backend]
        seen[op, *backend] += 1
        for values in itertools.product(*map(enumerate, axes)):
            given = (op, case, *backend, *(value for _, value in values))
            marks = () if quick(turn, *(at for at, _ in values)) else pytest.mark.slow
            found.append(pytest.param(*given, marks=marks, id="-".join(map(str, given))))
    return found


def run(spec, args, backend):
    return tensors(spec.call(*args[0], **args[1], backend=backend))


def check(spec, case, dtype, backend, **make):
    actual = run(spec, build(spec, case, dtype, **make), backend)
    low, exact = _results(spec.name, case, dtype, tuple(make.items()))
    assert len(actual) == len(exact) > 0
    for i, result in enumerate(zip(actual, low, exact, strict=True)):
        assert_error_budget(*result, factor=spec.budget, what=f"output {i}")


@cache  # the same for every backend
def _results(op, case, dtype, make):
    """(in `dtype`, in float64) of the reference."""
    spec, make = SPECS[op], dict(make)
    args = (build(spec, case, dtype, wide=wide, **make) for wide in (None, torch.float64))
    return [run(spec, given, "reference") for given in args]


def check_gradients(spec, case, dtype, backend, seeds):
    low, exact = _reference_gradients(spec.name, case, dtype, seeds)
    for name, grad in _gradients(spec, case, dtype, None, backend, seeds).items():
        what = f"gradient of argument {name}"
        assert_error_budget(grad, low[name], exact[name], factor=spec.gradient_budget, what=what)


@cache
def _reference_gradients(op, case, dtype, seeds):
    return [
        _gradients(SPECS[op], case, dtype, wide, "reference", seeds)
        for wide in (None, torch.float64)
    ]


def _gradients(spec, case, dtype, wide, backend, seeds):
    """Argument -> its gradient in every draw."""
    found = [
        gradients(spec, build(spec, case, dtype, wide=wide, seed=i), backend=backend)[1]
        for i in seeds
    ]
    return {name: torch.stack([grads[name] for grads in found]) for name in found[0]}
