"""Native attention where it takes turns: several tiles of keys, blocks of queries, chunks of rows.

The specs' small cases fit in one of each.
"""

import dataclasses

import pytest
import torch

from tvkernels import BackendError, FramePattern, _native, frame_attention, token_map_attention
from tvkernels._dispatch import OPS as DISPATCHED
from tvkernels.ops import specs
from tvkernels.testing.budget import assert_error_budget
from tvkernels.testing.calls import build, gradients, registered_arguments, tensors

OPS = ("frame_attention", "token_map_attention", "shift_restricted_temporal_attention")
MISSING = [reason for op in OPS for reason in _native.why_not("cpu", op)]
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(bool(MISSING), reason="; ".join(MISSING)),
]


def frames(pattern, f, grid, **other):
    case = {"pattern": pattern, "b": 2, "f": f, "grid": grid, "h": 2, "d": 12}
    return "frame_attention", case | {"lse": True, "queries": None} | other


def words(n, length, tokens):
    case = {"b": 2, "f": 2, "n": n, "h": 3, "d": 9, "length": length, "tokens": tokens}
    return "token_map_attention", case


def positions(f, n, c):
    case = {"b": 2, "f": f, "n": n, "c": c, "heads": 2, "bias": True, "sigma": "given"}
    return "shift_restricted_temporal_attention", case | {"offset": 1.0}


CASES = {
    "one_tile": frames("own", 1, (8, 16)),
    "tile_and_one_key": frames("own", 1, (3, 43)),
    "tiles_over_segments": frames("fine_coarse2_sized", 3, (7, 19)),
    "tiles_of_anchors": frames("uneven", 5, (9, 16)),
    "blocks": frames("first_previous", 2, (17, 20), b=1),
    "blocks_of_cached_frames": frames("fine_coarse4", 4, (18, 19), b=1, queries=(2,), d=33),
    "one_block": frames("own", 1, (16, 16), b=1),
    "block_and_one_query": frames("own", 1, (1, 257), b=1),
    "words_of_two_tiles": words(5, 200, (0, 127, 128, 199)),
    "blocks_of_queries": words(300, 7, (6,)),
    "chunks": positions(8, 300, 8),
    "chunks_of_few_positions": positions(17, 250, 4),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("layout", ("dense", "permuted"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_turns_within_error_budget(case, dtype, layout, threads):
    op, drawn = CASES[case]
    spec = dataclasses.replace(specs()[op], cases={case: drawn})

    def run(backend, **wide):
        positional, keyword = build(spec, case, dtype, layout=layout, **wide)
        return tensors(spec.call(*positional, **keyword, backend=backend))

    low, exact = run("reference"), run("reference", wide=torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = run("native")
    finally:
        torch.set_num_threads(before)
    for i, result in enumerate(zip(found, low, exact, strict=True)):
        assert_error_budget(*result, factor=spec.budget, what=f"output {i}")


@pytest.mark.parametrize("layout", ("dense", "permuted"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [name for name, (op, _) in CASES.items() if op == "frame_attention"]
)
def test_gradients_in_turns_within_error_budget(case, dtype, layout):
    """Whatever the number of threads, to the last bit."""
    op, drawn = CASES[case]
    spec = dataclasses.replace(specs()[op], cases={case: drawn})

    def run(backend, **wide):
        return gradients(spec, build(spec, case, dtype, layout=layout, **wide), backend=backend)[1]

    low, exact = run("reference"), run("reference", wide=torch.float64)
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            found.append(run("native"))
        finally:
            torch.set_num_threads(before)
    for name, grad in found[0].items():
        what = f"gradient of argument {name}"
        assert torch.equal(grad, found[1][name]), what
        assert_error_budget(grad, low[name], exact[name], factor=spec.gradient_budget, what=what)


def test_gradients_of_a_long_clip_take_fewer_queries_at_a_time():
    """Weights and slopes of 15,000 keys: more than stay near for 64 queries."""
    pattern, (q, k, v) = FramePattern.all(), torch.randn(3, 1, 50, 300, 1, 4)
    table = pattern.table(50, queries=(7,))
    found, expected = [], []
    for to, backend, dtype in ((found, "native", q.dtype), (expected, "cpu", torch.float64)):
        given = [x.to(dtype).requires_grad_() for x in (q[:, 7:8], k, v)]
        result = frame_attention(*given, table, backend=backend)
        to += torch.autograd.grad(result.square().sum(), given)
    for grad, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(grad.double(), exact, rtol=1e-4, atol=1e-6)


def test_many_small_weights_beside_a_large_one():
    """Each is below half a rounding step of the large one; together they are not."""
    size = 128  # of one tile
    q, k = torch.ones(1, 1, size, 1, 1), torch.zeros(1, 1, size, 1, 1)
    k[0, 0, 0] = 17.0  # 4e-8 for each of the others
    v = (torch.arange(size) == 0).float().view(1, 1, size, 1, 1)

    def run(backend, dtype=torch.float32):
        values = (x.to(dtype) for x in (q, k, v))
        return frame_attention(*values, FramePattern.own(), scale=1.0, backend=backend)

    assert_error_budget(run("native"), run("reference"), run("reference", torch.float64))


def test_no_nan_is_lost():
    """Not even one whose bits, as CUDA's own, would make a number beside an exponent."""
    q, k, v = (torch.randn(1, 1, 4, 1, 8) for _ in range(3))
    q[0, 0, 1] = torch.tensor([2**31 - 1], dtype=torch.int32).view(torch.float32)
    own = FramePattern.own()
    lost = frame_attention(q, k, v, own, backend="native").isnan()[0, 0, :, 0]
    assert lost[1].all() and not lost[[0, 2, 3]].any()
    _, maps = token_map_attention(q, k[:, 0], v[:, 0], torch.tensor([0, 1]), backend="native")
    assert maps[0, 0, 1].isnan().all() and not maps[0, 0, 0].isnan().any()


@pytest.mark.parametrize("other", (0.0, -1e20), ids=("some", "all"))
def test_keys_that_score_minus_infinity(other):
    """A whole tile of them first, and nothing else: NaN, as softmax has it."""
    q = torch.full((1, 2, 128, 1, 1), 1e20)
    k = torch.stack((torch.full((128, 1, 1), -1e20), torch.full((128, 1, 1), other)))[None]
    v = torch.randn(1, 2, 128, 1, 1)
    pattern = FramePattern.frames(anchors=(0, 1))
    found, expected = (
        frame_attention(q, k, v, pattern, scale=1.0, backend=b) for b in ("native", "reference")
    )
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_a_table_of_other_numbers_or_strides():
    q, k, v = (torch.randn(1, 3, 4, 1, 8) for _ in range(3))
    table = FramePattern.first_previous().table(3)
    expected = frame_attention(q, k, v, table, backend="native")
    turned = table._replace(segments=table.segments.t().contiguous().t())
    assert torch.equal(frame_attention(q, k, v, turned, backend="native"), expected)
    wide = table._replace(row_ptr=table.row_ptr.long())
    with pytest.raises(BackendError, match="table in int32 on the CPU"):
        frame_attention(q, k, v, wide, backend="native")


@pytest.mark.parametrize("token", (77, -1))
def test_a_position_outside_the_text(token):
    q, k = torch.randn(1, 2, 3, 2, 4), torch.randn(1, 77, 2, 4)
    with pytest.raises(IndexError, match=f"{token} is out of bounds"):
        token_map_attention(q, k, k, torch.tensor([5, token]), backend="native")


@pytest.mark.parametrize("asked", ("", "generic"))
@pytest.mark.parametrize("op", ("frame_attention", "token_map_attention"))
def test_without_wide_vectors_it_runs_where_asked_for(op, asked, monkeypatch):
    monkeypatch.setattr(_native, "level", lambda: "generic")
    monkeypatch.setenv("TVKERNELS_CPU_LEVEL", asked)
    spec = specs()[op]
    args = registered_arguments(spec, build(spec, spec.small_cases[0]))
    reasons = DISPATCHED[op].backend("native").why_not(*args)
    assert bool(reasons) == (not asked)
    assert all("slower than cpu" in reason for reason in reasons)
