"""The atlas ops against loops, torch's grid sampling and each other's transpose."""

import pytest
import torch
import torch.nn.functional as F

from tvkernels import atlas_composite, atlas_sample, atlas_splat

BACKENDS = ("cpu", "reference")


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_uv(b, p, seed=1):
    """A third of them outside [-1, 1], and the corners themselves."""
    uv = 1.5 * (
        2 * torch.rand(b, p, 2, generator=torch.Generator().manual_seed(seed)).double() - 1
    )
    uv[:, :2] = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    return uv


def dense(uv, height, width):
    """[P, H * W]: the share that each texel has in each point, one by one from the formula."""
    shares = torch.zeros(len(uv), height, width, dtype=torch.float64)
    for p, (u, v) in enumerate(uv.tolist()):
        x = min(max(((u + 1) * width - 1) / 2, 0), width - 1)
        y = min(max(((v + 1) * height - 1) / 2, 0), height - 1)
        for row in range(height):
            for column in range(width):
                shares[p, row, column] = max(0, 1 - abs(x - column)) * max(0, 1 - abs(y - row))
    return shares.flatten(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(4, 5), (1, 6), (1, 1)])
def test_sample_is_the_dense_product(size, backend):
    atlas, uv = draw(2, *size, 3), some_uv(2, 17)
    found = atlas_sample(atlas, uv, backend=backend)
    for b in range(2):
        torch.testing.assert_close(found[b], dense(uv[b], *size) @ atlas[b].flatten(0, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sample_and_its_gradients_are_grid_sampling(backend):
    atlas, uv = draw(2, 5, 7, 3).requires_grad_(), some_uv(2, 40).requires_grad_()
    plain = F.grid_sample(
        atlas.permute(0, 3, 1, 2), uv[:, None], padding_mode="border", align_corners=False
    )
    plain = plain[:, :, 0].transpose(1, 2)
    found = atlas_sample(atlas, uv, backend=backend)
    torch.testing.assert_close(found, plain)
    outer = draw(2, 40, 3, seed=2)
    expected = torch.autograd.grad(plain, (atlas, uv), outer)
    torch.testing.assert_close(torch.autograd.grad(found, (atlas, uv), outer), expected)


def test_outside_shows_the_border_and_has_no_slope():
    atlas = torch.arange(6.0).view(1, 1, 6, 1)
    uv = torch.tensor([[[-3.0, 0.0], [-1.0, 0.0], [1.0, 9.0], [5.0, 0.0]]]).requires_grad_()
    found = atlas_sample(atlas, uv)
    assert found.flatten().tolist() == [0, 0, 5, 5]
    (slope,) = torch.autograd.grad(found.sum(), uv)
    assert not slope.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weighted", (True, False))
def test_splat_is_the_normalised_transpose(weighted, backend):
    values, uv = draw(2, 30, 3), some_uv(2, 30)
    weight = torch.rand(2, 30, dtype=torch.float64) if weighted else None
    atlas, cover = atlas_splat(values, uv, (9, 8), weight=weight, backend=backend)
    for b in range(2):
        shares = dense(uv[b], 9, 8) * (weight[b, :, None] if weighted else 1)
        total = shares.sum(0)
        mean = (shares.T @ values[b]) / torch.where(total > 0, total, 1)[:, None]
        torch.testing.assert_close(cover[b].flatten(), total)
        torch.testing.assert_close(atlas[b].flatten(0, 1), mean)
        assert (total == 0).any() and not atlas[b].flatten(0, 1)[total == 0].any()


def test_splat_times_cover_is_the_adjoint_of_sample():
    atlas, values, uv = draw(1, 6, 7, 3), draw(1, 25, 3, seed=3), some_uv(1, 25)
    mean, cover = atlas_splat(values, uv, (6, 7))
    left = (atlas_sample(atlas, uv) * values).sum()
    torch.testing.assert_close(left, (atlas * mean * cover[..., None]).sum())


def test_a_clip_that_fills_its_atlas_comes_back():
    """Splat then sample is the identity where every texel is one pixel."""
    picture = draw(1, 4 * 6, 3)
    x, y = (2 * torch.arange(n, dtype=torch.float64) + 1 for n in (6, 4))
    uv = torch.stack(torch.meshgrid(x / 6 - 1, y / 4 - 1, indexing="xy"), -1).reshape(1, -1, 2)
    atlas, cover = atlas_splat(picture, uv, (4, 6))
    torch.testing.assert_close(cover, torch.ones_like(cover))
    torch.testing.assert_close(atlas_sample(atlas, uv), picture)


@pytest.mark.interpreter
def test_sums_into_texels_do_not_depend_on_the_order_of_points():
    pytest.importorskip("triton")
    values, uv = draw(1, 300, 3).float(), some_uv(1, 300).float()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(5))
    one = atlas_splat(values, uv, (3, 4), backend="triton")
    other = atlas_splat(values[:, order], uv[:, order], (3, 4), backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_composite_is_over_after_over(backend):
    layers, alpha = draw(2, 4, 9, 3), torch.rand(2, 3, 9, dtype=torch.float64)
    shown = layers[:, 3]
    for i in (2, 1, 0):
        shown = alpha[:, i, :, None] * layers[:, i] + (1 - alpha[:, i, :, None]) * shown
    torch.testing.assert_close(atlas_composite(layers, alpha, backend=backend), shown)


@pytest.mark.parametrize("backend", BACKENDS)
def test_composite_at_the_ends_is_one_layer_bit_for_bit(backend):
    layers = draw(1, 2, 5, 3, dtype=torch.float32)
    for value, layer in ((1.0, 0), (0.0, 1)):
        alpha = torch.full((1, 1, 5), value)
        assert torch.equal(atlas_composite(layers, alpha, backend=backend), layers[:, layer])


def test_splat_refuses_gradients_that_it_does_not_have():
    uv = some_uv(1, 5).requires_grad_()
    with pytest.raises(RuntimeError, match="no gradients"):
        atlas_splat(draw(1, 5, 3), uv, (2, 2))


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: atlas_sample(draw(1, 0, 4, 3), some_uv(1, 3)), "at least one texel"),
        (lambda: atlas_sample(draw(1, 4, 4, 3), some_uv(2, 3)), "uv is [1, P, 2]"),
        (lambda: atlas_sample(draw(1, 4, 4, 3), some_uv(1, 3).float()), "one floating dtype"),
        (lambda: atlas_splat(draw(1, 5, 3), some_uv(1, 4), (2, 2)), "uv is torch.float64 [1, 5"),
        (lambda: atlas_splat(draw(1, 5, 3), some_uv(1, 5), (0, 2)), "at least one texel"),
        (
            lambda: atlas_splat(draw(1, 5, 3), some_uv(1, 5), (2, 2), weight=draw(1, 4)),
            "weight is torch.float64 [1, 5]",
        ),
        (lambda: atlas_composite(draw(1, 0, 4, 3), draw(1, 0, 4)), "L of 1 or more"),
        (lambda: atlas_composite(draw(1, 2, 4, 3), draw(1, 2, 4)), "alpha is [1, 1, 4]"),
    ],
)
def test_bad_input_says_what_would_fit(call, complaint):
    with pytest.raises(ValueError) as error:
        call()
    assert complaint in str(error.value)
