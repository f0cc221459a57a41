"""Power iteration against a loop, numpy's singular values, and the launches it may take."""

import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tvkernels import power_iteration
from tvkernels._dispatch import OPS
from tvkernels.ops import specs
from tvkernels.testing.calls import build

pytestmark = pytest.mark.usefixtures("poisoned")

SPEC = specs()["power_iteration"]
INTERPRETED = [
    pytest.mark.interpreter,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]
EVERY = ("reference", "cpu", pytest.param("triton", marks=INTERPRETED))
# At test shapes the interpreter takes one launch for the first and several for the others.
SHAPES = ((6, 8), (9, 6), (1, 12), (37, 45), (70, 5))


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loop(weight, u, steps):
    """Miyato et al., algorithm 1, one number after the other."""

    def unit(found, previous):
        norm = math.sqrt(math.fsum(x * x for x in found))
        return [x / norm for x in found] if norm else previous

    def dot(row, vector):
        return math.fsum(w * x for w, x in zip(row, vector, strict=True))

    rows, columns, u = weight.tolist(), weight.T.tolist(), u.tolist()
    v = [len(columns) ** -0.5] * len(columns)
    for _ in range(steps):
        v = unit([dot(column, u) for column in columns], v)
        u = unit([dot(row, v) for row in rows], u)
    return [torch.tensor(x, dtype=torch.float64) for x in (u, v)]


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize(
    "case", [n for n in SPEC.small_cases if SPEC.cases[n]["c_in"] and SPEC.cases[n]["c_out"]]
)
def test_equals_a_loop(case, backend):
    (weight, u, steps), _ = build(SPEC, case, torch.float32)
    expected = loop(weight, u, steps)
    found = power_iteration(weight, u, steps, backend=backend)
    assert_close([x.double() for x in found], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("shape", SHAPES)
def test_finds_the_largest_singular_value(shape, backend):
    # The second singular value is a quarter of the first: ten steps reach all digits.
    left, _ = torch.linalg.qr(draw(shape[0], min(shape), seed=1))
    right, _ = torch.linalg.qr(draw(shape[1], min(shape), seed=2))
    values = 3 * 0.25 ** torch.arange(min(shape), dtype=torch.float64)
    weight = (left * values @ right.T).float()
    u, v = power_iteration(weight, draw(shape[0]).float(), 10, backend=backend)
    largest = np.linalg.svd(weight.double().numpy(), compute_uv=False)[0]
    assert_close((u @ weight @ v).double(), torch.tensor(largest), rtol=1e-6, atol=0)
    assert_close(torch.stack((u.norm(), v.norm())), torch.ones(2))


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_start_of_its_own_dtype_and_strides(shape, backend):
    """As a layer calls it: a weight in half precision, read transposed, and u in float32."""
    weight = draw(shape[1], shape[0]).half().T
    u = torch.stack((draw(shape[0], seed=3).float(), torch.full((shape[0],), math.nan)), 1)[:, 0]
    found = power_iteration(weight, u, 2, backend=backend)
    assert [x.dtype for x in found] == [torch.float32, torch.float32]
    assert_close([x.double() for x in found], loop(weight, u, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("scale", (1e-8, 1e8))
def test_products_do_not_grow_from_step_to_step(scale, backend):
    """Not divided by their norms, twelve of them would leave float32 either way."""
    weight, u = (draw(12, 15) * scale).float(), draw(12, seed=1).float()
    found = power_iteration(weight, u, 6, backend=backend)
    assert_close([x.double() for x in found], loop(weight, u, 6), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", EVERY)
def test_a_zero_weight_keeps_its_vectors(backend):
    u = draw(37).float()
    kept, v = power_iteration(torch.zeros(37, 45), u, 3, backend=backend)
    assert_close(kept, u, rtol=0, atol=0)
    assert_close(v, torch.full((45,), 45**-0.5))
    assert kept.data_ptr() != u.data_ptr()


@pytest.mark.interpreter
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    ("shape", "steps", "count"),
    [((6, 8), 1, 1), ((6, 8), 15, 1), ((37, 45), 1, 3), ((70, 5), 4, 9)],
)
def test_launches_are_few_and_read_the_weight_in_place(shape, steps, count, monkeypatch):
    module = OPS["power_iteration"].backend("triton")
    weight, seen = draw(*shape).half(), []

    def counted(kernel, grid, arguments, config, run=module.launch):
        seen.append(
            [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.dim() == 2]
        )
        run(kernel, grid, arguments, config)

    monkeypatch.setattr(module, "launch", counted)
    power_iteration(weight, draw(shape[0]).half(), steps, backend="triton")
    assert len(seen) == count
    matrices = [x for given in seen for x in given]
    assert len(matrices) == max(1, count - 1)
    assert all(x.data_ptr() == weight.data_ptr() for x in matrices)


def test_no_gradient_passes():
    weight = draw(4, 3).requires_grad_()
    u, v = power_iteration(weight, draw(4).requires_grad_())
    assert not u.requires_grad and not v.requires_grad


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weight": torch.ones(4)}, r"weight is \[C_out, C_in\]"),
        ({"u": torch.ones(3)}, r"got \(4, 3\), \(3,\), 1"),
        ({"steps": 0}, "steps 1 or more"),
        ({"weight": torch.ones(4, 3, dtype=torch.int64)}, "need floating dtypes"),
        ({"u": torch.ones(4, dtype=torch.int64)}, "need floating dtypes"),
    ],
)
def test_errors(change, says):
    call = {"weight": torch.ones(4, 3), "u": torch.ones(4), "steps": 1}
    with pytest.raises(ValueError, match=says):
        power_iteration(**(call | change))
