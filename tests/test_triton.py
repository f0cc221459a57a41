"""Every Triton kernel in Triton's interpreter: float32 and float16, against the error budget.

The interpreter runs a kernel's programs one after the other on the host. It cannot show races or
faults of the compiler; `tests/test_kernels.py` reads the compiled code, `make gpu` runs it.
"""

import pytest
import torch
from test_ops import check, check_gradients, run

from tvkernels._dispatch import OPS, BackendError
from tvkernels.ops import specs
from tvkernels.testing.calls import build

pytest.importorskip("triton")
from tvkernels._triton.launch import launch
from tvkernels.ops.instance_center.triton import _center

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned")]

SPECS = {name: spec for name, spec in specs().items() if "triton" in OPS[name].backends}
CASES = [(op, case) for op, spec in SPECS.items() for case in spec.small_cases]
TRAINED = [(op, case) for op, case in CASES if SPECS[op].gradients]
DTYPES = (torch.float32, torch.float16)
SEEDS = range(2)  # each is a run of the interpreter, forward and backward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_result_within_error_budget(op, case, dtype):
    check(SPECS[op], case, dtype, "triton")


@pytest.mark.parametrize(("op", "case"), CASES)
def test_permuted_strides(op, case):
    check(SPECS[op], case, torch.float32, "triton", layout="permuted")


@pytest.mark.parametrize("extreme", ("equal", "huge"))
@pytest.mark.parametrize(("op", "case"), CASES)
def test_extreme_values(op, case, extreme):
    check(SPECS[op], case, torch.float16, "triton", extreme=extreme)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), TRAINED)
def test_gradients_within_error_budget(op, case, dtype):
    check_gradients(SPECS[op], case, dtype, "triton", SEEDS)


def test_a_constant_that_the_kernel_lacks_is_an_error_in_the_interpreter_too():
    with pytest.raises(TypeError, match="_center has no WIDTH"):
        launch(_center, (1,), {}, {"BLOCK": 16, "num_warps": 1}, WIDTH=8)


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
