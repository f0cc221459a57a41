"""An op's results and gradients against float64, as every backend's tests compare them."""

import torch

from tvkernels.testing.budget import assert_error_budget
from tvkernels.testing.calls import build, gradients, tensors


def run(spec, args, backend):
    return tensors(spec.call(*args[0], **args[1], backend=backend))


def check(spec, case, dtype, backend, **make):
    actual = run(spec, build(spec, case, dtype, **make), backend)
    low = run(spec, build(spec, case, dtype, **make), "reference")
    exact = run(spec, build(spec, case, dtype, wide=torch.float64, **make), "reference")
    assert len(actual) == len(exact) > 0
    for i, result in enumerate(zip(actual, low, exact, strict=True)):
        assert_error_budget(*result, factor=spec.budget, what=f"output {i}")


def check_gradients(spec, case, dtype, backend, seeds):
    def draws(wide, backend):
        found = [
            gradients(spec, build(spec, case, dtype, wide=wide, seed=i), backend=backend)[1]
            for i in seeds
        ]
        return {name: torch.stack([grads[name] for grads in found]) for name in found[0]}

    low, exact = draws(None, "reference"), draws(torch.float64, "reference")
    for name, grad in draws(None, backend).items():
        what = f"gradient of argument {name}"
        assert_error_budget(grad, low[name], exact[name], factor=spec.gradient_budget, what=what)
