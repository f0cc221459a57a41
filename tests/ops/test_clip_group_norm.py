"""Clip-wide group norm against Tune-A-Video's 5-D call, a loop, and the memory it saves."""

import pytest
import torch
from torch import nn

from tvkernels import clip_group_norm
from tvkernels.ops.clip_group_norm.api import OP

SHAPE = (2, 3, 8, 5, 4)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(channels, dtype=torch.float32):
    return draw(channels, seed=1).to(dtype), draw(channels, seed=2).to(dtype)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("silu", (False, True))
def test_equals_a_loop_over_groups(backend, silu):
    x = draw(*SHAPE).double()
    weight, bias = parameters(8, torch.float64)
    expected = torch.empty_like(x)
    for b in range(2):
        for first in range(0, 8, 2):
            block = x[b, :, first : first + 2]
            spread = (block - block.mean()).square().mean()
            expected[b, :, first : first + 2] = (block - block.mean()) / (spread + 1e-3).sqrt()
    expected = expected * weight.view(8, 1, 1) + bias.view(8, 1, 1)
    if silu:
        expected = expected / (1 + (-expected).exp())
    found = clip_group_norm(x, weight, bias, 4, eps=1e-3, silu=silu, backend=backend)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_equals_the_module_of_the_inflated_block(backend):
    """`nn.GroupNorm` on b c f h w, as Tune-A-Video's ResnetBlock3D calls it."""
    norm = nn.GroupNorm(4, 8, eps=1e-6)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(draw(8, seed=5))
    x = draw(*SHAPE)
    expected = norm(x.permute(0, 2, 1, 3, 4)).permute(0, 2, 1, 3, 4)
    found = clip_group_norm(x, norm.weight, norm.bias, 4, eps=1e-6, backend=backend)
    torch.testing.assert_close(found, expected)
    per_frame = norm(x.flatten(0, 1)).unflatten(0, SHAPE[:2])
    assert (found - per_frame).abs().max() > 0.01


def test_one_frame_is_plain_group_norm():
    x, (weight, bias) = draw(2, 1, 8, 5, 4), parameters(8)
    plain = nn.functional.group_norm(x[:, 0], 2, weight, bias)
    torch.testing.assert_close(clip_group_norm(x, weight, bias, 2)[:, 0], plain)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_a_large_mean_keeps_its_digits(dtype):
    """Sums of squares would lose a spread of 1 beside a mean of 500; centred sums do not."""
    x = (draw(1, 3, 4, 16, 16) + 500).to(dtype)
    one, zero = torch.ones(4, dtype=dtype), torch.zeros(4, dtype=dtype)
    found = clip_group_norm(x, one, zero, 2, backend="cpu").double()
    wide = x.double().transpose(1, 2)
    exact = nn.functional.group_norm(wide, 2).transpose(1, 2)
    assert (found - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_a_constant_clip_gives_the_bias():
    x, (weight, bias) = torch.full(SHAPE, 300.0), parameters(8)
    found = clip_group_norm(x, weight, bias, 4)
    torch.testing.assert_close(found, bias.view(8, 1, 1).expand(SHAPE), atol=0.02, rtol=0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_memory_beyond_the_result_is_less_than_a_clip(dtype):
    """The reference copies the clip to [B, C, F, h, w] and back; cpu holds a few frames."""
    x, (weight, bias) = draw(1, 16, 32, 16, 16).to(dtype), parameters(32, dtype)

    def peak(backend):
        with torch.profiler.profile(profile_memory=True) as profile:
            OP.backend(backend).forward(x, weight, bias, 4, 1e-5, True)
        held, most = 0, 0
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            most = max(most, held)
        return most / (x.numel() * x.element_size())

    assert peak("cpu") < 1.4
    assert peak("reference") >= 2


def test_saved_for_backward_is_the_input_alone():
    """SiLU and the affine map keep nothing: the backward computes them again."""
    x, (weight, bias) = draw(*SHAPE).requires_grad_(), parameters(8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        clip_group_norm(x, weight, bias, 4, silu=True)
    assert sum(t.numel() for t in kept) == x.numel() + 16


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.zeros(2, 8, 5, 4)}, r"x is \[B, F, C, h, w\]"),
        ({"weight": torch.zeros(7)}, "one for each channel"),
        ({"groups": 3}, "3 groups do not divide 8 channels"),
        ({"groups": 0}, "0 groups"),
        ({"bias": torch.zeros(8).half()}, "one floating dtype"),
    ],
)
def test_errors(change, says):
    call = {"x": draw(*SHAPE), "weight": torch.ones(8), "bias": torch.zeros(8), "groups": 4}
    with pytest.raises(ValueError, match=says):
        clip_group_norm(**(call | change))
