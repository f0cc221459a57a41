"""Every op, case, backend and precision against float64: results and gradients.

The reference is what they are held to. Its own witnesses are in `test_witness.py`; here its
registered backward is held to torch's autograd, in float64.
"""

import pytest
import torch
from op_checks import check, check_gradients, product, run

from tvkernels import _native
from tvkernels._dispatch import OPS, Op
from tvkernels.ops import specs
from tvkernels.testing.calls import build, gradients, leaves, tensors

pytestmark = pytest.mark.usefixtures("poisoned")

SPECS = specs()
CASES = [(op, case) for op, spec in SPECS.items() for case in spec.small_cases]
TRAINED = [(op, case) for op, case in CASES if SPECS[op].gradients]
BACKENDS = ("cpu", "reference")  # composed PyTorch: every op has both, in float64 too
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Where the library is not built, the last line of the run says so.
NATIVE = [op for op in SPECS if "native" in OPS[op].backends and not _native.why_not("cpu")]


def on(items, *backends):
    """(op, ..., backend) for each item and backend, the native one for the ops that have it."""
    backends = ("native", *backends)
    return [(*x, b) for x in items for b in backends if b != "native" or x[0] in NATIVE]


SEEDS = range(8)  # the rounding error of one number, such as sigma's gradient, says little
IN_TURNS = {"quick": lambda turn, dtype, extreme: dtype == (turn + extreme) % 3}
FLOAT32_AND_A_HALF = {"quick": lambda turn, dtype: dtype in (0, 1 + turn % 2)}


@pytest.mark.parametrize(
    ("op", "case", "backend", "dtype"), product(on(CASES, "cpu"), DTYPES, **FLOAT32_AND_A_HALF)
)
def test_result_within_error_budget(op, case, backend, dtype):
    check(SPECS[op], case, dtype, backend)


@pytest.mark.parametrize(("op", "case", "backend"), on(CASES, "cpu"))
def test_permuted_strides(op, case, backend):
    check(SPECS[op], case, torch.float32, backend, layout="permuted")


@pytest.mark.parametrize(
    ("op", "case", "backend", "dtype", "extreme"),
    product(on(CASES, "cpu"), DTYPES, ("equal", "huge"), **IN_TURNS),
)
def test_extreme_values(op, case, backend, dtype, extreme):
    check(SPECS[op], case, dtype, backend, extreme=extreme)


@pytest.mark.parametrize(("op", "case", "backend"), on(TRAINED, "cpu"))
def test_gradients_within_error_budget(op, case, backend):
    check_gradients(SPECS[op], case, torch.float32, backend, SEEDS)


@pytest.mark.parametrize(
    ("op", "case", "layout"),
    product(TRAINED, ("dense", "permuted"), quick=lambda turn, layout: layout == turn % 2),
)
def test_gradients_exact_in_float64(op, case, layout, monkeypatch):
    """The registered backward against torch's own autograd through the reference's operations."""
    spec = SPECS[op]
    with monkeypatch.context() as patch:
        patch.setattr(Op, "__call__", lambda op, *a, backend: op.backend(backend).forward(*a))
        args = build(spec, case, torch.float64, layout=layout)
        truth, expected = gradients(spec, args, backend="reference")
    for backend in BACKENDS:
        args = build(spec, case, torch.float64, layout=layout)
        results, grads = gradients(spec, args, backend=backend)
        torch.testing.assert_close(results, truth)
        torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", [op for op, spec in SPECS.items() if spec.gradients])
def test_gradcheck(op, backend):
    spec = SPECS[op]
    args = build(spec, spec.small_cases[0], torch.float64)
    inputs = leaves(spec, args)

    def call(*values):
        given = dict(zip(inputs, values, strict=True))
        positional = [given.get(i, x) for i, x in enumerate(args[0])]
        keyword = {name: given.get(name, x) for name, x in args[1].items()}
        results = tensors(spec.call(*positional, **keyword, backend=backend))
        return [x for x in results if x.requires_grad]

    assert torch.autograd.gradcheck(call, list(inputs.values()), fast_mode=True)


@pytest.mark.parametrize(("op", "backend"), on([(op,) for op in SPECS], *BACKENDS))
def test_same_bits_twice(op, backend):
    spec = SPECS[op]
    for case in spec.small_cases:
        first, second = (run(spec, build(spec, case), backend) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b), f"{case} differs from one run to the next"
        if spec.gradients:
            first, second = (gradients(spec, build(spec, case), backend=backend)[1] for _ in "12")
            for name in first:
                assert torch.equal(first[name], second[name]), f"gradient {name} of {case} differs"
