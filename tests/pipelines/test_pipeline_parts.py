"""A pipeline whose parts are changed under it: adapters, other UNets, copies, slices."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import (
    StableDiffusionPipeline,
)

from tvkernels.pipelines.cache import Cache

PROMPT = "a red circle on a blue striped background"


def test_adapters_are_in_the_keys(load, clip, tmp_path):
    from peft import LoraConfig

    pipe, cache = load(), Cache(tmp_path)
    pipe.fit(clip, PROMPT, num_steps=0, cache=cache)
    pipe.invert(clip, num_inference_steps=1, cache=cache)
    pipe.unet.add_adapter(LoraConfig(target_modules=["to_q"], init_lora_weights=False))
    pipe.invert(clip, num_inference_steps=1, cache=cache)
    pipe.unet.disable_adapters()
    pipe.invert(clip, num_inference_steps=1, cache=cache)
    assert cache.hits == 0 and len(list(tmp_path.iterdir())) == 3
    pipe.invert(clip, num_inference_steps=1, cache=cache)
    assert cache.hits == 1


def test_adapters_are_not_tuned_and_not_saved(load, clip, tmp_path):
    from peft import LoraConfig

    pipe = load()
    pipe.fit(clip, PROMPT, num_steps=1)
    before = pipe.handle.tuned_state()
    pipe.unet.add_adapter(LoraConfig(target_modules=["to_q", "to_k"], init_lora_weights=False))
    state = pipe.handle.tuned_state()
    assert state.keys() == before.keys()
    assert all(torch.equal(before[name], x) for name, x in state.items())
    assert not any("lora" in name for name in pipe.handle.tuned_parameters())
    pipe.handle.load_tuned_state({name: x + 1 for name, x in before.items()})
    assert all(torch.equal(before[n] + 1, x) for n, x in pipe.handle.tuned_state().items())
    with pytest.raises(ValueError, match="holds LoRA adapters: fuse_lora"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_removed_handle_is_told(load, clip, tmp_path):
    pipe = load()
    pipe.fit(clip, PROMPT, num_steps=0)
    pipe.handle.remove()
    for call in (lambda: pipe("a star"), lambda: pipe.invert(clip)):
        with pytest.raises(ValueError, match="call fit"):
            call()
    pipe.save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.safetensors"))
    load().from_pretrained(tmp_path / "plain")
    pipe.fit(clip, PROMPT, num_steps=0)
    assert pipe("a star", num_inference_steps=1, output_type="latent").frames.isfinite().all()


def test_another_unet_is_taken(load, clip):
    pipe, other = load(), load()
    other.handle.remove()
    with torch.no_grad():
        for parameter in other.unet.parameters():
            parameter.zero_()
    pipe.invert(clip, num_inference_steps=1)
    with pytest.raises(ValueError, match="accelerate"):
        pipe.unet = torch.compile(pipe.unet)
    with pytest.raises(RuntimeError, match="already patched"):
        pipe.unet = load().unet
    latents, unet = pipe.inverted, pipe.unet
    pipe.unet = other.unet
    assert pipe.inverted is None and not hasattr(unet, "_tvkernels_handle")
    found = pipe("a star", latents=latents, num_inference_steps=1, output_type="latent").frames
    alpha = pipe.scheduler.alphas_cumprod
    t = pipe.scheduler.timesteps[0]
    target = alpha[t - 1000] if t >= 1000 else pipe.scheduler.final_alpha_cumprod
    torch.testing.assert_close(found, latents * (target / alpha[t]).sqrt())  # it predicts no noise


def test_a_pipeline_from_another_and_a_copy(load, folder, clip):
    plain = StableDiffusionPipeline.from_pretrained(folder)
    pipe = type(load()).from_pipe(plain)
    pipe.set_progress_bar_config(disable=True)
    pipe.invert(clip, num_inference_steps=1)
    found, again = (
        p("a star", num_inference_steps=1, output_type="latent").frames
        for p in (pipe, copy.deepcopy(pipe))
    )
    torch.testing.assert_close(again, found)


def test_fit_does_not_undo_what_a_call_would_refuse(load, clip):
    pipe = load()
    pipe.unet.set_attention_slice("auto")
    with pytest.raises(RuntimeError, match="now holds SlicedAttnProcessor"):
        pipe.fit(clip, PROMPT, num_steps=0)


@pytest.mark.parametrize(("steps", "says"), [(0, "from 1"), (-1, "from 1"), (2.5, "whole number"),
                                             (1000, "ask for 999")])  # fmt: skip
def test_numbers_of_steps_that_are_none(load, clip, steps, says):
    pipe = load()
    with pytest.raises(ValueError, match=says):
        pipe(PROMPT, latents=torch.zeros(2, 4, 4, 4), num_inference_steps=steps)
    with pytest.raises(ValueError, match="0 or more"):
        pipe.fit(clip, PROMPT, num_steps=-1)
    for guidance in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"guidance {guidance}: ask for"):
            pipe(PROMPT, latents=torch.zeros(2, 4, 4, 4), guidance_scale=guidance)
    for shape in ((2, 5, 4, 4), (1, 4, 2, 4, 4)):
        with pytest.raises(ValueError, match=r"give one clip's \[F, 4, h, w\]"):
            pipe(PROMPT, latents=torch.zeros(shape))
