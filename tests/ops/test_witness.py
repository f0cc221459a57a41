"""Independent witnesses for the references, from the papers, and the design's exact identities.

All in float64; `assert_close` then compares to a relative 1e-7.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import tvkernels
from tvkernels.ops import specs
from tvkernels.ops.frame_attention.reference import pool
from tvkernels.ops.frame_attention.spec import PATTERNS
from tvkernels.testing.calls import build

pytestmark = pytest.mark.usefixtures("poisoned")

SPECS = specs()
REFERENCE = {"backend": "reference"}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cases(op):
    return pytest.mark.parametrize("case", SPECS[op].small_cases)


def loop_pool(x, grid, level):
    """[B, F, N, H, D] averaged cell by cell: no pooling routine, no reshape."""
    h, w = grid
    cells = []
    for top in range(0, h, level):
        for left in range(0, w, level):
            inside = [
                y * w + c
                for y in range(top, min(top + level, h))
                for c in range(left, min(left + level, w))
            ]
            cells.append(sum(x[:, :, i] for i in inside) / len(inside))
    return torch.stack(cells, 2)


@cases("frame_attention")
def test_frame_attention_is_attention_under_a_dense_mask(case):
    """All tokens at every level side by side, a mask row for each frame, torch's attention."""
    spec = SPECS["frame_attention"]
    (q, k, v, given), options = build(spec, case, torch.float64)
    grid, frames = options["grid"], k.shape[1]
    pattern, queries = PATTERNS[spec.cases[case]["pattern"]], spec.cases[case]["queries"]
    levels = sorted({s.level for row in pattern.segments(frames) for s in row} | {0})
    everything = []
    for x in (k, v):
        stages = [loop_pool(x, grid, level) if level else x for level in levels]
        everything.append(torch.cat([stage.flatten(1, 2) for stage in stages], 1).transpose(1, 2))
    mask = pattern.materialize(frames, grid)
    result = tvkernels.frame_attention(q, k, v, given, **options, **REFERENCE)
    out, lse = result if options["return_lse"] else (result, None)
    for f, row in enumerate(range(frames) if queries is None else queries):
        query = q[:, f].transpose(1, 2)
        bias = mask[row].expand(q.shape[2], -1)
        expected = F.scaled_dot_product_attention(query, *everything, attn_mask=bias)
        assert_close(out[:, f], expected.transpose(1, 2))
        if lse is not None:
            scores = query @ everything[0].mT * q.shape[-1] ** -0.5 + bias
            assert_close(lse[:, f], scores.logsumexp(-1).transpose(1, 2))


@pytest.mark.parametrize("level", (2, 3, 4))
@pytest.mark.parametrize("grid", ((4, 4), (5, 7), (1, 6), (3, 2)))
def test_pool_is_the_mean_of_what_is_there(grid, level):
    x = randn(2, 3, grid[0] * grid[1], 2, 5)
    assert_close(pool(x, *grid, level), loop_pool(x, grid, level))


@cases("temporal_attention")
def test_temporal_attention_is_a_loop_over_positions(case):
    (q, k, v), options = build(SPECS["temporal_attention"], case, torch.float64)
    b, f, n, h, d = q.shape
    scale = options["scale"] or 1 / math.sqrt(d)
    expected = torch.zeros_like(q)
    for index in np.ndindex(b, n, h):
        i, token, head = index
        for query in range(f):
            scores = [(q[i, query, token, head] @ k[i, j, token, head]) * scale for j in range(f)]
            weights = [math.exp(s - max(scores)) for s in scores]
            for j in range(f):
                expected[i, query, token, head] += weights[j] / sum(weights) * v[i, j, token, head]
    assert_close(tvkernels.temporal_attention(q, k, v, **options, **REFERENCE), expected)


@cases("instance_center")
def test_instance_center_is_a_loop_over_positions_and_channels(case):
    (z,), _ = build(SPECS["instance_center"], case, torch.float64)
    expected = torch.zeros_like(z)
    for i, token, channel in np.ndindex(z.shape[0], *z.shape[2:]):
        column = z[i, :, token, channel].tolist()
        for f, value in enumerate(column):
            expected[i, f, token, channel] = value - math.fsum(column) / len(column)
    assert_close(tvkernels.instance_center(z, **REFERENCE), expected)


def test_instance_center_does_not_average_over_space():
    z = randn(1, 4, 6, 3)
    by_token = [tvkernels.instance_center(z[:, :, i : i + 1], **REFERENCE) for i in range(6)]
    assert_close(tvkernels.instance_center(z, **REFERENCE), torch.cat(by_token, 2))


def largest_singular_value(weight):
    return np.linalg.svd(weight.double().numpy(), compute_uv=False)[0]


def over(weight, sigma):
    """W / sigma by numpy; an all-zero W stays zero."""
    value = largest_singular_value(weight) if sigma is None else sigma.item()
    return weight * (1 / value if value else 0)


@cases("spectral_linear")
def test_spectral_linear_divides_by_numpys_singular_value(case):
    (x, weight, bias), options = build(SPECS["spectral_linear"], case, torch.float64)
    expected = np.einsum("...i,oi->...o", x.numpy(), over(weight, options["sigma"]).numpy())
    expected = torch.from_numpy(np.asarray(expected)) + (0 if bias is None else bias)
    assert_close(tvkernels.spectral_linear(x, weight, bias, **options, **REFERENCE), expected)


@cases("shift_restricted_temporal_attention")
def test_stam_is_the_papers_loop(case):
    """EI2 eq. 3, 6, 8 and 9, one position and one head at a time."""
    args, options = build(SPECS["shift_restricted_temporal_attention"], case, torch.float64)
    z, w_q, w_k, w_v, w_out, bias = args
    heads = options["heads"]
    d = z.shape[-1] // heads
    w_v = over(w_v, options.get("sigma_v"))
    w_out = over(w_out, options.get("sigma_out"))
    expected = z.clone()
    for i, token in np.ndindex(z.shape[0], z.shape[2]):
        if not z.shape[1]:
            continue
        clip = z[i, :, token]
        ic = clip - sum(clip) / len(clip)
        parts = []
        for head in range(heads):
            rows = slice(head * d, (head + 1) * d)
            q, k, v = (ic @ w[rows].T for w in (w_q, w_k, w_v))
            parts.append(torch.softmax(q @ k.T / math.sqrt(d), -1) @ v)
        expected[i, :, token] += torch.cat(parts, -1) @ w_out.T
    if bias is not None:
        expected += bias
    found = tvkernels.shift_restricted_temporal_attention(*args, **options, **REFERENCE)
    assert_close(found, expected)


@pytest.mark.parametrize("shape", ((6, 9), (9, 6), (1, 4), (5, 1)))
def test_spectral_sigma_exact_and_by_power_iteration(shape):
    weight = randn(*shape)
    expected = torch.tensor(largest_singular_value(weight))
    assert_close(tvkernels.spectral_sigma(weight), expected)
    u, v = tvkernels.power_iteration(weight, randn(shape[0], seed=1), steps=300)
    assert_close(u.norm(), torch.ones_like(expected))
    assert_close(v.norm(), torch.ones_like(expected))
    assert_close(tvkernels.spectral_sigma(weight, u, v), expected)


def test_spectral_sigma_gradient_is_the_outer_product_of_its_vectors():
    weight = randn(6, 4).requires_grad_()
    left, _, right = np.linalg.svd(weight.detach().numpy())
    expected = torch.from_numpy(np.outer(left[:, 0], right[0]))
    assert_close(torch.autograd.grad(tvkernels.spectral_sigma(weight), weight)[0], expected)
    u, v = tvkernels.power_iteration(weight, randn(6, seed=1), steps=300)
    assert not u.requires_grad and not v.requires_grad
    assert_close(torch.autograd.grad(tvkernels.spectral_sigma(weight, u, v), weight)[0], expected)


def test_one_power_iteration_is_miyatos():
    weight, u = randn(3, 5).float(), randn(3, seed=1).float()
    v = weight.T @ u / (weight.T @ u).norm()
    expected = weight @ v / (weight @ v).norm()
    assert_close(tvkernels.power_iteration(weight, u), (expected, v))


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("how", ("exact", "iterated"))
def test_zero_weight_gives_the_bias_and_finite_gradients(how, backend):
    weight, bias = torch.zeros(4, 3, requires_grad=True), torch.ones(4, requires_grad=True)
    x, u = randn(2, 3).float().requires_grad_(), randn(4).float()
    sigma = None
    if how == "iterated":
        u, v = tvkernels.power_iteration(weight, u)
        sigma = tvkernels.spectral_sigma(weight, u, v)
    out = tvkernels.spectral_linear(x, weight, bias, sigma=sigma, backend=backend)
    assert_close(out, bias.expand(2, 4))
    grads = torch.autograd.grad(out.sum(), [x, weight, bias])
    assert all(g.isfinite().all() for g in grads)


def test_power_iteration_survives_a_zero_weight():
    u, v = tvkernels.power_iteration(torch.zeros(4, 3), randn(4), steps=2)
    weight = randn(4, 3)
    u, v = tvkernels.power_iteration(weight, u, steps=300)
    expected = torch.tensor(largest_singular_value(weight))
    assert_close(tvkernels.spectral_sigma(weight, u, v), expected, rtol=1e-5, atol=0)


# The exact identities of the design, section 3.


def test_pooling_commutes_with_an_affine_projection():
    grid, weight, bias = (5, 7), randn(6, 4), randn(6)
    z = randn(1, 3, 35, 1, 4, seed=1)
    project = lambda x: x @ weight.T + bias  # noqa: E731
    assert_close(pool(project(z), *grid, 2), project(pool(z, *grid, 2)))


def test_centering_commutes_with_a_projection_without_bias():
    z, weight, bias = randn(2, 5, 4, 8) + 3, randn(6, 8, seed=1), randn(6, seed=2)
    center = tvkernels.instance_center
    assert_close(center(z @ weight.T), center(z) @ weight.T)
    assert not torch.allclose(center(z @ weight.T + bias), center(z) @ weight.T + bias)


def test_only_the_querys_centering_survives_and_values_lose_their_mean():
    q, k, v = (randn(2, 5, 4, 2, 8, seed=i) + i + 1 for i in range(3))
    center = lambda x: tvkernels.instance_center(x.flatten(3)).view_as(x)  # noqa: E731
    attend = tvkernels.temporal_attention
    expected = attend(center(q), center(k), center(v))
    assert_close(attend(center(q), k, v) - v.mean(1, keepdim=True), expected)
    assert not torch.allclose(attend(q, k, v) - v.mean(1, keepdim=True), expected)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_results_over_disjoint_keys_merge_by_log_sum_exp(backend):
    q, k, v = (randn(1, 4, 12, 2, 8, seed=i).float() for i in range(3))
    options = {"grid": (3, 4), "return_lse": True, "backend": backend}
    own = tvkernels.FramePattern.own()
    coarse = tvkernels.FramePattern.rows([[(j, 2) for j in range(4) if j != f] for f in range(4)])
    (a, lse_a), (b, lse_b) = (
        tvkernels.frame_attention(q, k, v, p, **options) for p in (own, coarse)
    )
    both = tvkernels.FramePattern.fine_coarse(2)
    expected, lse = tvkernels.frame_attention(q, k, v, both, **options)
    merged = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = ((x - merged).exp()[..., None] for x in (lse_a, lse_b))
    assert_close(merged, lse)
    assert_close(weight_a * a + weight_b * b, expected)


def test_a_stored_map_is_recomputed_from_stored_queries_and_keys():
    """FateZero replays the source's map on the edit's values; q, k and the log-sum-exp give it."""
    q, k, v, edited = (randn(1, 3, 12, 2, 8, seed=i) for i in range(4))
    pattern = tvkernels.FramePattern.first_previous()
    stored = []
    for row in pattern.segments(3):
        keys = torch.cat([k[:, s.frame] for s in row for _ in range(s.count)], 1)
        f = len(stored)
        scores = torch.einsum("bnhd,bmhd->bhnm", q[:, f], keys) / math.sqrt(8)
        stored.append((row, scores.softmax(-1)))
    replayed = tvkernels.frame_attention(q, k, edited, pattern)
    for f, (row, probabilities) in enumerate(stored):
        values = torch.cat([edited[:, s.frame] for s in row for _ in range(s.count)], 1)
        expected = torch.einsum("bhnm,bmhd->bnhd", probabilities, values)
        assert_close(replayed[:, f], expected)
    assert not torch.allclose(replayed, tvkernels.frame_attention(q, k, v, pattern))


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_a_doubled_frame_counts_twice_and_a_doubled_row_once(backend):
    q, k, v = (randn(1, 2, 6, 2, 8, seed=i) for i in range(3))
    call = lambda rows: tvkernels.frame_attention(  # noqa: E731
        q, k, v, tvkernels.FramePattern.rows(rows), backend=backend
    )
    assert_close(call([[0, 0, 1, 1], [1, 1]]), call([[0, 1], [1]]), rtol=0, atol=0)
    found = call([[0, 0, 1], [1]])[:, 0]
    keys, values = (torch.cat([x[:, 0], x[:, 0], x[:, 1]], 1).transpose(1, 2) for x in (k, v))
    expected = F.scaled_dot_product_attention(q[:, 0].transpose(1, 2), keys, values)
    assert_close(found, expected.transpose(1, 2))
    assert not torch.allclose(found, call([[0, 1], [1]])[:, 0])


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_spectral_norm_folds_into_the_weight(backend):
    x, weight, bias = randn(2, 3, 8), randn(5, 8, seed=1), randn(5, seed=2)
    folded = weight / tvkernels.spectral_sigma(weight)
    expected = tvkernels.spectral_linear(x, weight, bias, backend=backend)
    assert_close(F.linear(x, folded, bias), expected)
    args, options = build(SPECS["shift_restricted_temporal_attention"], "exact", torch.float64)
    stam = tvkernels.shift_restricted_temporal_attention
    expected = stam(*args, **options, backend=backend)
    args[3], args[4] = (w / tvkernels.spectral_sigma(w) for w in args[3:5])
    one = torch.ones((), dtype=torch.float64)
    found = stam(*args, **options, sigma_v=one, sigma_out=one, backend=backend)
    assert_close(found, expected)


def test_temporal_attention_beyond_the_grid_limit(monkeypatch):
    """More heads times positions than a CUDA grid holds take the five-dimensional form."""
    q, k, v = (randn(2, 3, 5, 2, 4, seed=i) for i in range(3))
    expected = tvkernels.temporal_attention(q, k, v)
    monkeypatch.setattr("tvkernels.ops.temporal_attention.cpu.MAX_HEADS", 9)
    assert_close(tvkernels.temporal_attention(q, k, v), expected)
