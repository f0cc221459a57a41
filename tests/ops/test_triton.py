"""Every Triton kernel in Triton's interpreter: float32 and float16, against the error budget.

The interpreter runs a kernel's programs one after the other on the host. It cannot show races or
faults of the compiler; `tests/testing/test_kernels.py` reads the compiled code, `make gpu` runs
it.
"""

import pytest
import torch
from op_checks import check, check_gradients, product, run

from tvkernels._dispatch import OPS, BackendError
from tvkernels.ops import specs
from tvkernels.testing.calls import build

pytest.importorskip("triton")
from tvkernels import latent_blend
from tvkernels._triton import support
from tvkernels._triton.launch import launch
from tvkernels.ops.atlas_sample.kernels import unit
from tvkernels.ops.instance_center.triton import _center
from tvkernels.ops.token_map_attention import triton as token_maps

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned")]

SPECS = {name: spec for name, spec in specs().items() if "triton" in OPS[name].backends}
CASES = [(op, case) for op, spec in SPECS.items() for case in spec.small_cases]
TRAINED = [(op, case) for op, case in CASES if SPECS[op].gradients]
DTYPES = (torch.float32, torch.float16)
IN_TURNS = {"quick": lambda turn, value: value == turn % 2}


# Both dtypes of every case: together they take all but a few of the kernels' constants.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_result_within_error_budget(op, case, dtype):
    check(SPECS[op], case, dtype, "triton")


@pytest.mark.parametrize(("op", "case"), CASES)
def test_permuted_strides(op, case):
    check(SPECS[op], case, torch.float32, "triton", layout="permuted")


@pytest.mark.parametrize(("op", "case", "extreme"), product(CASES, ("equal", "huge"), **IN_TURNS))
def test_extreme_values(op, case, extreme):
    check(SPECS[op], case, torch.float16, "triton", extreme=extreme)


@pytest.mark.parametrize(("op", "case", "dtype"), product(TRAINED, DTYPES, **IN_TURNS))
def test_gradients_within_error_budget(op, case, dtype):
    # Each seed is a run of the interpreter; one number, as sigma's gradient is, takes several.
    seeds = range(3 if any(isinstance(x, str) for x in SPECS[op].gradients) else 1)
    check_gradients(SPECS[op], case, dtype, "triton", seeds)


def test_what_saved_a_tensor_before_it_is_blended_in_place_is_told():
    """The version counts: autograd raises, where it would take wrong values."""
    x = torch.ones(1, 2, 4, 4)
    before = x._version
    latent_blend(x, torch.zeros_like(x), torch.ones_like(x[:, :1]), backend="triton")
    assert x._version > before
    with torch.inference_mode():
        latent_blend(*(torch.ones(1, 2, 4, 4) for _ in range(3)), backend="triton")


def test_wide_heads_leave_the_fused_block(monkeypatch):
    """Its stages of weights would need more shared memory than a multiprocessor has."""
    block = OPS["shift_restricted_temporal_attention"].backend("triton")
    seen = []
    monkeypatch.setattr(block, "_in_parts", lambda z, *rest: seen.append(rest[-1]) or z)
    monkeypatch.setattr(block, "_attend", lambda *args: None)
    monkeypatch.setattr(block, "_project", lambda *args: None)
    z, weight = torch.zeros(1, 2, 1, 320, dtype=torch.float16), torch.zeros(320, 320)
    for heads in (8, 4, 2, 1):
        block.forward(z, weight, weight, weight, weight, None, weight[0, 0], weight[0, 0], heads)
    assert seen == [4, 2, 1]


def test_alignment_is_that_of_the_address():
    """A tensor from elsewhere starts at offset 0 of its storage, wherever that begins."""
    memory = bytearray(2 * 4096 + 64)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 16
    for shift, expected in ((0, 8), (2, 1), (8, 4)):
        x = torch.frombuffer(memory, dtype=torch.float16, count=4000, offset=start + shift)
        assert x.storage_offset() == 0
        assert token_maps._alignment(40, x.view(1, 10, 10, 40)) == expected


def test_not_a_number_stays_one_in_what_is_added_as_integers():
    like = torch.zeros(1)
    assert unit(torch.tensor(float("nan")), 4, like).isnan()
    assert unit(torch.tensor(0.0), 4, like).isfinite()


def test_a_constant_that_the_kernel_lacks_is_an_error_in_the_interpreter_too():
    with pytest.raises(TypeError, match="_center has no WIDTH"):
        launch(_center, (1,), {}, {"BLOCK": 16, "num_warps": 1}, WIDTH=8)


@pytest.mark.parametrize("op", SPECS)
def test_bfloat16_is_refused_in_the_interpreter(op):
    spec = SPECS[op]
    args = build(spec, spec.small_cases[0], torch.bfloat16)
    with pytest.raises(BackendError, match="silently wrong in bfloat16"):
        run(spec, args, "triton")


def test_a_blend_of_shifted_views_of_one_memory_is_refused():
    """Its blocks would read what others have written; composed PyTorch takes it."""
    half, kept = torch.full((1023,), 0.5), torch.arange(1024.0)
    expected = (kept[1:] + kept[:-1]) / 2
    with pytest.raises(BackendError, match="background overlaps foreground"):
        latent_blend(kept[1:], kept[:-1], half, backend="triton")
    latent_blend(kept[1:], kept[:-1], half)
    torch.testing.assert_close(kept[1:], expected)
    latent_blend(kept, kept, torch.tensor(0.5), backend="triton")  # element by element


def test_an_interpreter_that_numpy_has_outrun_is_refused(monkeypatch):
    monkeypatch.setattr(support.triton, "__version__", "3.6.0")
    monkeypatch.setattr("numpy.__version__", "2.4.0")
    assert "needs NumPy before 2.4" in support.why_not(torch.zeros(1))[0]


@pytest.mark.parametrize("op", SPECS)
def test_auto_leaves_cpu_tensors_to_the_cpu_backend(op, monkeypatch):
    spec = SPECS[op]

    def never(*args):
        raise AssertionError("auto ran Triton on CPU tensors")

    monkeypatch.setattr(OPS[op].backend("triton"), "forward", never)
    run(spec, build(spec, spec.small_cases[0]), "auto")
