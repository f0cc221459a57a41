"""Every Triton kernel in Triton's interpreter: float32 and float16, against the error budget.

The interpreter runs a kernel's programs one after the other on the host. It cannot show races or
faults of the compiler; `tests/test_kernels.py` reads the compiled code, `make gpu` runs it.
"""

import pytest
import torch

from tvkernels._dispatch import OPS, BackendError
from tvkernels.ops import specs
from tvkernels.testing.budget import assert_error_budget
from tvkernels.testing.calls import build, gradients, tensors

pytest.importorskip("triton")
pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned")]

SPECS = {name: spec for name, spec in specs().items() if "triton" in OPS[name].backends}
CASES = [(op, case) for op, spec in SPECS.items() for case in spec.small_cases]
TRAINED = [(op, case) for op, case in CASES if SPECS[op].gradients]
DTYPES = (torch.float32, torch.float16)
SEEDS = range(2)  # each is a run of the interpreter, forward and backward


def run(spec, args, backend):
    return tensors(spec.call(*args[0], **args[1], backend=backend))


def check(spec, case, dtype, **make):
    actual = run(spec, build(spec, case, dtype, **make), "triton")
    low = run(spec, build(spec, case, dtype, **make), "reference")
    exact = run(spec, build(spec, case, dtype, wide=torch.float64, **make), "reference")
    assert len(actual) == len(exact) > 0
    for i, result in enumerate(zip(actual, low, exact, strict=True)):
        assert_error_budget(*result, factor=spec.budget, what=f"output {i}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_result_within_error_budget(op, case, dtype):
    check(SPECS[op], case, dtype)


@pytest.mark.parametrize(("op", "case"), CASES)
def test_permuted_strides(op, case):
    check(SPECS[op], case, torch.float32, layout="permuted")


@pytest.mark.parametrize("extreme", ("equal", "huge"))
@pytest.mark.parametrize(("op", "case"), CASES)
def test_extreme_values(op, case, extreme):
    check(SPECS[op], case, torch.float16, extreme=extreme)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), TRAINED)
def test_gradients_within_error_budget(op, case, dtype):
    spec = SPECS[op]

    def draws(wide, backend):
        found = [
            gradients(spec, build(spec, case, dtype, wide=wide, seed=s), backend=backend)[1]
            for s in SEEDS
        ]
        return {name: torch.stack([grads[name] for grads in found]) for name in found[0]}

    actual, low = draws(None, "triton"), draws(None, "reference")
    exact = draws(torch.float64, "reference")
    for name in exact:
        assert_error_budget(
            actual[name], low[name], exact[name],
            factor=spec.gradient_budget, what=f"gradient of {name}",
        )  # fmt: skip


@pytest.mark.parametrize("op", SPECS)
def test_bfloat16_is_refused_in_the_interpreter(op):
    spec = SPECS[op]
    args = build(spec, spec.small_cases[0], torch.bfloat16)
    with pytest.raises(BackendError, match="silently wrong in bfloat16"):
        run(spec, args, "triton")


@pytest.mark.parametrize("op", SPECS)
def test_auto_leaves_cpu_tensors_to_the_cpu_backend(op, monkeypatch):
    spec = SPECS[op]

    def never(*args):
        raise AssertionError("auto ran Triton on CPU tensors")

    monkeypatch.setattr(OPS[op].backend("triton"), "forward", never)
    run(spec, build(spec, spec.small_cases[0]), "auto")
