"""DDIM steps against diffusers' schedulers, inversion against its inverse, and what is refused."""

import pytest
import torch

from tvkernels import ddim_inversion_step, guided_ddim_step, latent_blend

SD15 = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "skip_prk_steps": True,
    "trained_betas": None,
}
SHAPE = (2, 3, 4, 5, 6)


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(3)
    return lambda *shape: torch.randn(shape, generator=generator)


def schedule(guidance=1.0):
    """(timestep, [3]) of 50 steps with the numbers of SD-1.5's scheduler, by its definition."""
    betas = torch.linspace(SD15["beta_start"] ** 0.5, SD15["beta_end"] ** 0.5, 1000) ** 2
    alphas = (1 - betas).cumprod(0)
    for t in range(981, 0, -20):
        target = alphas[max(t - 20, 0)]  # set_alpha_to_one is off: the last target is alphas[0]
        yield t, torch.tensor([alphas[t], target, guidance])


def assert_equal_to_rounding(actual, expected):
    """float32, a few rounding steps of values whose x0 is up to 15 times larger."""
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < 15 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_equals_diffusers_over_50_steps(backend, draw):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler.from_config(SD15)
    scheduler.set_timesteps(50)
    steps = list(schedule(guidance=7.5))
    assert scheduler.timesteps.tolist() == [t for t, _ in steps]
    for t, step in steps:
        sample, noise = draw(*SHAPE), draw(4, *SHAPE[1:])
        unconditional, conditional = noise.chunk(2)
        guided = unconditional + 7.5 * (conditional - unconditional)
        expected = scheduler.step(guided, t, sample).prev_sample
        assert_equal_to_rounding(guided_ddim_step(sample, noise, step, backend=backend), expected)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_inversion_equals_diffusers_over_50_steps(backend, draw):
    diffusers = pytest.importorskip("diffusers")
    # The constructor's own defaults (clip_sample, set_alpha_to_one) would be another inversion.
    inverse = diffusers.DDIMInverseScheduler.from_config(
        diffusers.DDIMScheduler.from_config(SD15).config
    )
    inverse.set_timesteps(50)
    steps = list(schedule())[::-1]
    assert inverse.timesteps.tolist() == [t for t, _ in steps]
    for t, (noisy, clean, unread) in ((t, step.tolist()) for t, step in steps):
        sample, noise = draw(*SHAPE), draw(*SHAPE)
        expected = inverse.step(noise, t, sample).prev_sample
        step = torch.tensor([clean, noisy, unread])
        assert_equal_to_rounding(
            ddim_inversion_step(sample, noise, step, backend=backend), expected
        )


def test_round_trip_over_50_steps(draw):
    """With the noise of each step given back, denoising undoes inversion."""
    start = draw(*SHAPE)
    latents, noises = start, []
    for _, step in reversed(list(schedule())):
        noises.append(draw(*SHAPE))
        latents = ddim_inversion_step(latents, noises[-1], step[[1, 0, 2]])
    assert (latents - start).abs().max() > 1
    for _, step in schedule():
        latents = guided_ddim_step(latents, noises.pop(), step)
    assert (latents - start).abs().max() < 50 * torch.finfo(torch.float32).eps * 15


def test_background_is_kept_bit_for_bit(draw):
    """Where the mask is 0 nothing of the edit remains, in half precision too."""
    _, step = next(schedule(7.5))
    mask = torch.zeros(SHAPE[-2:], dtype=torch.bool)
    mask[:2] = True
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        sample, background = (draw(*SHAPE).to(dtype) for _ in range(2))
        noise = draw(*SHAPE).to(dtype)
        plain = guided_ddim_step(sample, noise, step)
        result = guided_ddim_step(sample, noise, step, mask=mask, background=background)
        assert torch.equal(result[..., 2:, :], background[..., 2:, :])
        assert torch.equal(result[..., :2, :], plain[..., :2, :])
        blended = plain.clone()
        assert latent_blend(blended, background, mask) is blended
        assert torch.equal(blended, result)


def test_guidance_is_read_from_the_tensor(draw):
    """One compiled graph, no new one for another step."""
    sample, noise = draw(*SHAPE), draw(4, *SHAPE[1:])
    torch._dynamo.reset()
    compiled = torch.compile(guided_ddim_step, fullgraph=True, backend="eager")
    steps = [step for _, step in schedule(3.0)][:3]
    compiled(sample, noise, steps[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in steps:
            assert torch.equal(
                compiled(sample, noise, step), guided_ddim_step(sample, noise, step)
            )
    assert not torch.equal(
        guided_ddim_step(sample, noise, steps[0]),
        guided_ddim_step(sample, noise, steps[0] * torch.tensor([1, 1, 2.0])),
    )


def test_blend_in_place_is_seen_by_autograd(draw):
    """A value that autograd saved and the blend overwrote must not be used."""
    leaf = draw(3, 4).requires_grad_()
    saved = leaf * 2
    result = saved.square().sum()
    with torch.no_grad():
        latent_blend(saved, draw(3, 4), torch.rand(3, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


def test_blend_writes_through_a_view(draw):
    clip, background = draw(2, 3, 4, 5), draw(3, 2, 4, 5)
    expected = clip.clone()
    latent_blend(clip.transpose(0, 1), background, torch.tensor(0.25))
    expected = expected * 0.25 + background.transpose(0, 1) * 0.75
    torch.testing.assert_close(clip, expected)


def test_lost_gradients_are_refused(draw):
    sample, noise, (_, step) = draw(*SHAPE).requires_grad_(), draw(*SHAPE), next(schedule())
    for call in (
        lambda: guided_ddim_step(sample, noise, step),
        lambda: ddim_inversion_step(noise, sample, step),
        lambda: latent_blend(noise, sample, torch.ones(1)),
    ):
        with pytest.raises(RuntimeError, match="has no gradients"):
            call()
        with torch.no_grad():
            assert not call().requires_grad


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"noise": torch.zeros(3, 3, 4, 5, 6)}, "twice its leading size"),
        ({"noise": torch.zeros(SHAPE, dtype=torch.int64)}, "floating tensors"),
        ({"step": torch.ones(2)}, r"float32 \[3\]"),
        ({"step": torch.ones(3, dtype=torch.float16)}, r"float32 \[3\]"),
        ({"step": torch.ones(3, device="meta")}, "step is on meta"),
        ({"mask": torch.ones(1)}, "come together"),
        ({"background": torch.zeros(SHAPE)}, "come together"),
        ({"mask": torch.ones(7), "background": torch.zeros(SHAPE)}, "does not broadcast"),
        ({"mask": torch.ones(1), "background": torch.zeros(1)}, "needs the shape and dtype"),
        ({"mask": torch.ones(1).int(), "background": torch.zeros(SHAPE)}, "bool or floating"),
    ],
)
def test_errors(change, says):
    call = {"sample": torch.zeros(SHAPE), "noise": torch.zeros(SHAPE), "step": torch.ones(3)}
    with pytest.raises(ValueError, match=says):
        guided_ddim_step(**(call | change))


def test_inversion_has_no_guidance():
    with pytest.raises(ValueError, match="inversion has no guidance"):
        ddim_inversion_step(torch.zeros(2, 3), torch.zeros(4, 3), torch.ones(3))
