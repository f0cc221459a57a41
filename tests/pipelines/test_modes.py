"""The mode that a caller is in changes nothing: gradients off, inference mode, autocast."""

import contextlib

import pytest
import torch
from tiny_unets import seeded

from tvkernels.pipelines.common import make_tunable

MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "none": contextlib.nullcontext,
}


def edit(pipe, clip, mode=contextlib.nullcontext):
    with mode():
        pipe.fit(clip, "a red circle", num_steps=1, learning_rate=0.01, generator=seeded())
        pipe.invert(clip, num_inference_steps=1)
        return pipe("a star", num_inference_steps=1, output_type="latent").frames


@pytest.fixture(scope="module")
def expected(folder):
    from tiny_pipelines import loader, noisy_clip

    return edit(loader(folder)(), noisy_clip())


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "autocast"])
def test_every_call_in_a_mode(load, clip, expected, mode):
    found = edit(load(), clip, MODES[mode])
    assert torch.equal(found, expected) and not found.is_inference()


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_a_model_loaded_in_a_mode(load, clip, expected, mode, tmp_path):
    with MODES[mode]():
        pipe = load()
    pipe.unet.requires_grad_(False)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(edit(pipe, clip), expected)


def test_a_model_moved_in_inference_mode(load, clip, expected):
    pipe = load()
    with torch.inference_mode():
        pipe.to(torch.float64)
        pipe.to(torch.float32)
    assert torch.equal(edit(pipe, clip), expected)


def test_what_shares_a_parameter_goes_on_sharing_it():
    with torch.inference_mode():
        one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        other.weight = one.weight
    make_tunable(one)
    assert other.weight is one.weight and not one.weight.is_inference()
    one.weight.requires_grad_(True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_latents_are_float32_whatever_the_models_work_in(load, clip, dtype):
    pipe, seen = load("frame-by-frame").to(dtype), []
    noise = pipe.invert(clip, num_inference_steps=2)

    def callback(pipe, step, t, tensors):
        seen.append(tensors["latents"].dtype)
        return {}

    frames = pipe("a star", num_inference_steps=2, output_type="latent",
                  callback_on_step_end=callback).frames  # fmt: skip
    assert {noise.dtype, frames.dtype, *seen} == {torch.float32}
    assert {pipe.unet.dtype, pipe.vae.dtype} == {dtype}
    wide = load("frame-by-frame")
    whole = wide.invert(clip, num_inference_steps=2)
    assert (noise - whole).abs().mean() < 0.05 * whole.abs().mean()


@pytest.mark.parametrize("name", ["fit", "invert", "__call__"])
def test_a_lack_of_memory_is_told_with_advice(load, clip, name, monkeypatch):
    pipe = load("frame-by-frame")

    def full(*args, **kwargs):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(pipe, "_encode_video", full)
    with pytest.raises(torch.OutOfMemoryError, match="expandable_segments"):
        getattr(pipe, name)(video=clip, **({} if name == "invert" else {"prompt": "x"}))
