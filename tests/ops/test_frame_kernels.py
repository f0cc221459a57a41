"""frame_attention's Triton kernels where the walk over its cases does not go.

Other sources of queries, keys and values than one projection each, what is allocated, the
exponentials taken off the special-function unit, offsets beyond 32 bits.
"""

import re

import pytest
import torch
from held import Held
from torch._subclasses.fake_tensor import FakeTensorMode

from tvkernels import FramePattern, frame_attention
from tvkernels._dispatch import OPS, BackendError
from tvkernels.ops import specs
from tvkernels.testing.budget import assert_error_budget
from tvkernels.testing.calls import build, registered_arguments, tensors

pytest.importorskip("triton")
from tvkernels._triton import maths
from tvkernels._triton.launch import record
from tvkernels.ops.frame_attention import triton as backend

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned")]
SPEC = specs()["frame_attention"]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(q, k, v, pattern, **options):
    """Triton against the reference in the same precision and in float64; returns the results."""
    call = lambda *x, **o: tensors(frame_attention(*x, pattern, **options, **o))  # noqa: E731
    found = call(q, k, v, backend="triton")
    low = call(q, k, v, backend="reference")
    exact = call(q.double(), k.double(), v.double(), backend="reference")
    for i, result in enumerate(zip(found, low, exact, strict=True)):
        assert_error_budget(*result, what=f"output {i}")
    return found


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_queries_read_a_cache_of_earlier_frames(dtype):
    """Pix2Video, Rerender: frame f asks for {0, f - 1} of cached frames, some of them not yet."""
    q, k, v = randn(2, 2, 15, 2, 8), randn(2, 6, 15, 2, 8, seed=1), randn(2, 6, 15, 2, 8, seed=2)
    k[:, 4:] = v[:, 4:] = float("nan")  # frames to come
    table = FramePattern.first_previous().table(6, queries=(3, 4))
    q, k, v = (x.to(dtype) for x in (q, k, v))
    found = check(q, k, v, table)[0]
    whole = frame_attention(k[:, :4], k[:, :4], v[:, :4], FramePattern.first_previous())
    own = frame_attention(k[:, 3:4], k, v, FramePattern.first_previous().table(6, queries=(3,)))
    torch.testing.assert_close(own[:, 0], whole[:, 3])
    assert torch.isfinite(found).all()


def test_a_table_that_does_not_fit_is_refused_and_not_read_past():
    q, pattern = randn(1, 3, 16, 2, 8), FramePattern.fine_coarse(2)
    with pytest.raises(ValueError, match=r"this pattern pools tokens: pass grid"):
        frame_attention(q, q, q, pattern.table(3), backend="triton")
    few = q[:, :2]
    with pytest.raises(ValueError, match="the pattern's table is of 3 frames, k has 2"):
        frame_attention(q, few, few, FramePattern.own().table(3), backend="triton")
    table = pattern.table(3)
    call = (q, q, q, *table[:2], table.coarse_levels, 0, 0, None, False)
    with pytest.raises(BackendError, match="a grid that was not given"):  # in compiled code
        OPS["frame_attention"](*call, backend="triton")


def test_queries_keys_and_values_of_three_sources_with_three_layouts():
    """TokenFlow, FateZero: nothing says that q, k and v lie in memory alike."""
    q = randn(2, 15, 2, 3, 8).permute(0, 3, 1, 2, 4)
    k = randn(2, 4, 2, 8, 15, seed=1).permute(0, 1, 4, 2, 3)
    v = randn(4, 2, 15, 2, 16, seed=2).transpose(0, 1)[..., ::2]
    check(q, k, v, FramePattern.fine_coarse(2).table(4, queries=(0, 1, 3)), grid=(5, 3))


@pytest.mark.parametrize("pattern", (FramePattern.previous_own(), FramePattern.fine_coarse(2)))
def test_slices_of_one_fused_projection_are_read_in_place(pattern, monkeypatch):
    fused = randn(2, 3, 20, 3, 2, 8, dtype=torch.float16)
    q, k, v = fused.unbind(3)
    check(q, k, v, pattern, grid=(4, 5))
    started = []
    monkeypatch.setattr(
        backend, "launch", lambda kernel, grid, given, *a, **c: started.append(given)
    )
    frame_attention(q, k, v, pattern, grid=(4, 5), backend="triton")
    for given in started:
        for name, x in (("q", q), ("k", k), ("v", v)):
            assert name not in given or given[name].data_ptr() == x.data_ptr()


def test_a_stored_map_is_recomputed_from_stored_queries_and_keys():
    """FateZero keeps q and k, not the map: exp(q k^T * scale - lse) is the map of the source."""
    q, k, v = (randn(1, 3, 12, 2, 8, seed=i) for i in range(3))
    pattern = FramePattern.first_previous()
    out, lse = frame_attention(q, k, v, pattern, return_lse=True, backend="triton")
    for f, row in enumerate(pattern.segments(3)):
        keys = torch.cat([k[:, s.frame] for s in row for _ in range(s.count)], 1)
        scores = torch.einsum("bnhd,bmhd->bhnm", q[:, f], keys) * 8**-0.5
        stored = scores.softmax(-1)
        recomputed = (scores - lse[:, f].transpose(1, 2)[..., None]).exp()
        torch.testing.assert_close(recomputed, stored)
        values = torch.cat([v[:, s.frame] for s in row for _ in range(s.count)], 1)
        replayed = torch.einsum("bhnm,bmhd->bnhd", recomputed, values)
        torch.testing.assert_close(out[:, f], replayed)


def test_results_over_disjoint_keys_merge_by_log_sum_exp():
    q, k, v = (randn(1, 4, 12, 2, 8, seed=i) for i in range(3))
    coarse = FramePattern.rows([[(j, 2) for j in range(4) if j != f] for f in range(4)])
    (a, lse_a), (b, lse_b), (expected, lse) = (
        frame_attention(q, k, v, p, grid=(3, 4), return_lse=True, backend="triton")
        for p in (FramePattern.own(), coarse, FramePattern.fine_coarse(2))
    )
    merged = torch.logaddexp(lse_a, lse_b)
    torch.testing.assert_close(merged, lse)
    weight_a, weight_b = ((x - merged).exp()[..., None] for x in (lse_a, lse_b))
    torch.testing.assert_close(weight_a * a + weight_b * b, expected)


@pytest.mark.parametrize("scale", (0.0, -0.7, 3.0))
@pytest.mark.parametrize("tokens", (16, 21))
def test_any_scale(scale, tokens):
    """A maximum of scaled scores is the scaled maximum only where the scale is not negative."""
    q, k, v = (randn(1, 2, tokens, 1, 40, seed=i) for i in range(3))
    pattern = FramePattern.frames(anchors=(0, 0, 1))
    check(q, k, v, pattern, scale=scale, return_lse=True)
    outer = randn(*q.shape, seed=3)
    # Quarters, whose products are exact: at scores near 100 a weight is right only where the
    # backward's product has the forward's bits, and BLAS sums K Q^T in another order than Q K^T.
    q, k = (x.mul(4).round() / 4 for x in (q, k))

    def gradients(name, dtype=torch.float32):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = frame_attention(*leaves, pattern, scale=scale, backend=name)
        return torch.autograd.grad(out, leaves, outer.to(dtype))

    found, low = gradients("triton"), gradients("reference")
    for result in zip(found, low, gradients("reference", torch.float64), strict=True):
        assert_error_budget(*result)


@pytest.mark.parametrize("through", (0, 1), ids=("result", "log-sum-exp"))
def test_gradients_through_one_of_two_results(through):
    inputs = [randn(1, 2, 20, 2, 8, seed=i).requires_grad_() for i in range(3)]
    pattern = FramePattern.rows([[0, (1, 2)], [(0, 4), (1, 2), 0, 0]])
    grads = []
    for name in ("triton", "reference"):
        found = frame_attention(*inputs, pattern, grid=(4, 5), return_lse=True, backend=name)
        weight = randn(*found[through].shape, seed=7)
        loss = (found[through] * weight).sum()
        grads.append(torch.autograd.grad(loss, inputs, allow_unused=True))
    torch.testing.assert_close(*grads)


def test_gradients_of_heads_that_lie_apart():
    """Slices of wider heads: their strides are multiples of 4, the pooled heads' are not."""
    inputs = [randn(1, 2, 16, 2, 8, seed=i)[..., :6].requires_grad_() for i in range(3)]
    weight = randn(1, 2, 16, 2, 8, seed=7)
    grads = []
    for name in ("triton", "reference"):
        out = frame_attention(*inputs, FramePattern.fine_coarse(2), grid=(4, 4), backend=name)
        wide = torch.cat((out, torch.zeros(1, 2, 16, 2, 2)), -1)
        grads.append(torch.autograd.grad((wide * weight).sum(), inputs))
    torch.testing.assert_close(*grads)


def test_gradient_of_a_frame_that_nobody_reads_is_zero():
    q, k, v = (
        randn(1, 1, 16, 1, 8),
        *(randn(1, 3, 16, 1, 8, seed=i).requires_grad_() for i in (1, 2)),
    )
    table = FramePattern.fine_coarse(2).table(3, queries=(1,))
    out = frame_attention(q, k, v, table, grid=(4, 4), backend="triton")
    for grad in torch.autograd.grad(out.square().sum(), (k, v)):
        assert (grad.abs().sum((0, 2, 3, 4)) > 0).all()
    table = FramePattern.previous_own().table(3, queries=(1,))
    out = frame_attention(q, k, v, table, backend="triton")
    for grad in torch.autograd.grad(out.square().sum(), (k, v)):
        assert (grad[:, 2] == 0).all() and (grad[:, :2] != 0).any()


def test_offsets_beyond_32_bits():
    """Frames 2^31 elements apart; pages that nothing touches cost no memory."""
    torch.use_deterministic_algorithms(False)  # which would fill all of it with NaN
    try:
        memory = torch.empty(2**31 + 1024, dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(f"4 GiB of addresses were refused: {error}")
    far = memory.as_strided((1, 2, 16, 1, 8), (0, 2**31, 8, 8, 1))
    near = randn(1, 2, 16, 1, 8, dtype=torch.float16)
    far.copy_(near)
    for pattern in (FramePattern.previous_own(), FramePattern.fine_coarse(2)):
        found = frame_attention(far, far, far, pattern, grid=(4, 4), backend="triton")
        expected = frame_attention(near, near, near, pattern, grid=(4, 4), backend="triton")
        assert torch.equal(found, expected)


def test_what_no_kernel_takes_is_said():
    x = randn(1, 1, 2, 1, 257)
    with pytest.raises(BackendError, match="head dim 257 is above 256"):
        frame_attention(x, x, x, FramePattern.own(), backend="triton")
    x = x[..., :256]
    table = FramePattern.own().table(1)
    for arch, expected in (("sm_89", ["head dim 256 is above 192 on sm_89"]), ("sm_90", [])):
        with record(arch):
            assert backend.why_not(x, x, x, *table[:2], [0, 0], 0, 0, None, False) == expected
    x = x[..., :8]
    wide = torch.empty_strided((1, 1, 2, 1, 8), (0, 0, 2**24, 8, 1), device="meta")
    reasons = backend.why_not(wide, x, x, *table[:2], [0, 0], 0, 0, None, False)
    assert any("tokens of q are 16777216 elements apart" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("d", "widths"),
    [(8, (16, 0)), (16, (16, 0)), (20, (32, 0)), (33, (32, 16)), (40, (32, 16)), (64, (64, 0)),
     (80, (64, 16)), (96, (64, 32)), (112, (128, 0)), (160, (128, 32)), (256, (256, 0))],
)  # fmt: skip
def test_head_dims_are_not_padded_to_powers_of_two(d, widths):
    assert maths.split(d) == widths


def test_polynomial_stays_below_half_a_rounding_step_of_16_bits():
    """The instructions' numbers, their arithmetic in float64: floor, polynomial, exponent."""
    asm = maths.MIXED_EXP2.value
    numbers = [int(x, 16) for x in re.findall(r"0f([0-9A-F]{8})", asm)]
    floats = torch.tensor(numbers, dtype=torch.int64).to(torch.int32).view(torch.float32).tolist()
    least, magic, again, c3, c2, c1, c0 = floats
    assert (least, magic, again, c0) == (-127.0, 1.5 * 2**23, 1.5 * 2**23, 1.0)
    assert len(re.findall(r"\bex2\b", asm)) == 3, "three of four on the special-function unit"
    x = torch.linspace(-126, 0, 2**20, dtype=torch.float64)
    f = x - x.floor()
    error = ((((c3 * f + c2) * f + c1) * f + c0) * x.floor().exp2() / x.exp2() - 1).abs().max()
    assert error < 8.7e-5 < torch.finfo(torch.float16).eps / 2
    # floor(x) + 1.5 * 2^23 holds floor(x) in its low bits, which the shift moves to the exponent.
    n = torch.arange(-127, 1, dtype=torch.int32)
    bits = (n + magic).to(torch.float32).view(torch.int32)
    power = ((bits << 23) + torch.tensor(1.0).view(torch.int32)).view(torch.float32)
    assert torch.equal(power[1:], n[1:].float().exp2()) and power[0] == 0


CASE = "sd15-guidance-64"  # 24 frames, 64 x 64, guidance


def fake_run(dtype=torch.bfloat16):
    """What the forward allocates and starts at full size on a GPU that is not there."""
    with FakeTensorMode(), record("sm_90") as recorder, torch.no_grad():
        args = list(registered_arguments(SPEC, build(SPEC, CASE, dtype)))
        args[:5] = [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in args[:5]]
        with Held(args) as seen:
            out, _ = backend.forward(*args)
    return args, out, seen, recorder.launches


def test_nothing_is_allocated_but_the_result_and_the_pooled_keys_and_values():
    args, out, seen, launches = fake_run()
    q, k = args[:2]
    frame = q.numel() * 2
    assert out.numel() * 2 == frame
    pooled = 2 * k.numel() // 4 * 2
    assert seen.most == frame + pooled
    assert len(launches) == 2, "one pooling, one attention"


def test_peak_memory_against_the_reference():
    """The definition gathers every frame's keys and values, and holds one frame's scores."""
    args, _, ours, _ = fake_run()
    given = [x.shape for x in args[:3]]
    table = FramePattern.fine_coarse(2).table(24)
    q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in given)
    with Held([q, k, v, *table]) as seen, torch.no_grad():
        OPS["frame_attention"].backend("reference").forward(
            q, k, v, *table[:2], [2, 0], 64, 64, None, False
        )
    print(f"ours {ours.most}, reference {seen.most}, ratio {seen.most / ours.most:.1f}")
    assert seen.most > 30 * ours.most
