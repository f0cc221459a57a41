"""The one-shot pipelines: diffusers' conventions, DDIM against its schedulers, bytes, cache."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
from functools import partial
from shutil import copytree

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback

from tvkernels.demo import MODEL_DIR
from tvkernels.pipelines import METHODS, pipeline_class
from tvkernels.pipelines.cache import Cache, content_key
from tvkernels.pipelines.checks import ModelError, check_model, check_unet
from tvkernels.pipelines.common import decode_chunks, decode_latents
from tvkernels.pipelines.one_shot import OneShotPipeline
from tvkernels.recipes import ABLATIONS

PROMPT = "a red circle on a blue striped background"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# StableVideo needs a clip with optical flow: tests/pipelines/test_stable_video.py.
@pytest.mark.parametrize("method", [name for name in METHODS if name != "stable-video"])
def test_every_method_edits_a_clip_whole(load, clip, method):
    pipe = load(method)
    tuned = 1 if pipe.settings.recipe.tuned else None
    pipe.fit(clip, PROMPT, num_steps=tuned, generator=seeded())
    noise = pipe.invert(clip, num_inference_steps=2)
    told = {"words": [("red circle", "blue star")]} if method == "blended-diffusion" else {}
    frames = pipe("a blue star", num_inference_steps=2, output_type="pil", **told).frames
    assert noise.shape == (3, 4, 4, 6)
    assert len(frames) == 1 and len(frames[0]) == 3 and frames[0][0].size == (48, 32)


@pytest.mark.parametrize("method", METHODS)
def test_keeps_the_conventions_of_diffusers(method):
    parameters = inspect.signature(pipeline_class(method).__call__).parameters
    assert {"video", "generator", "callback_on_step_end", "output_type"} <= set(parameters)
    assert pipeline_class(method).model_cpu_offload_seq == "text_encoder->unet->vae"


def test_output_types(load, clip):
    pipe = load("frame-by-frame")
    pipe.invert(clip, num_inference_steps=1)
    shapes = {
        kind: pipe("", num_inference_steps=1, output_type=kind, return_dict=False)[0].shape
        for kind in ("np", "pt", "latent")
    }
    assert shapes == {"np": (1, 3, 32, 48, 3), "pt": (1, 3, 3, 32, 48), "latent": (3, 4, 4, 6)}
    with pytest.raises(ValueError, match="output_type"):
        pipe("", output_type="jpg")


def test_inversion_is_diffusers_own(load, clip):
    """Frame by frame the whole pipeline has an independent witness: diffusers' loop."""
    pipe = load("frame-by-frame")
    noise = pipe.invert(clip, num_inference_steps=5)
    pipe.handle.remove()
    pixels = torch.from_numpy(clip).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
        tokens = pipe.tokenizer("", padding="max_length", return_tensors="pt").input_ids
        text = pipe.text_encoder(tokens)[0].repeat(3, 1, 1)
        scheduler = DDIMInverseScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(5)
        for t in scheduler.timesteps:
            latents = scheduler.step(pipe.unet(latents, t, text).sample, t, latents).prev_sample
    torch.testing.assert_close(noise, latents, rtol=1e-4, atol=1e-4)


def test_sampling_is_diffusers_own(load, clip):
    pipe = load("frame-by-frame")
    start = pipe.invert(clip, num_inference_steps=5)
    result = pipe(
        "a star", num_inference_steps=5, guidance_scale=3.0, negative_prompt="red",
        output_type="latent", return_dict=False,
    )[0]  # fmt: skip
    pipe.handle.remove()
    latents = start
    scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False
    )
    scheduler.set_timesteps(5)
    with torch.no_grad():
        tokens = pipe.tokenizer(["red", "a star"], padding="max_length", return_tensors="pt")
        text = pipe.text_encoder(tokens.input_ids)[0].repeat_interleave(3, 0)
        for t in scheduler.timesteps:
            low, high = pipe.unet(torch.cat([latents] * 2), t, text).sample.chunk(2)
            latents = scheduler.step(low + 3.0 * (high - low), t, latents).prev_sample
    torch.testing.assert_close(result, latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["ei2", "frame-by-frame"])
def test_guidance_in_two_calls_is_the_same_in_half_the_batch(load, clip, method):
    pipe = load(method)
    pipe.invert(clip, num_inference_steps=2)
    batches = []
    pipe.unet.register_forward_pre_hook(lambda unet, args: batches.append(len(args[0])))
    options = {"num_inference_steps": 2, "guidance_scale": 7.5, "output_type": "latent"}
    whole = pipe("a star", negative_prompt="red", **options).frames
    split = pipe("a star", negative_prompt="red", split_guidance=True, **options).frames
    assert batches == [6, 6, 3, 3, 3, 3]
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-4)
    swapped = pipe("red", negative_prompt="a star", split_guidance=True, **options).frames
    assert (swapped - whole).abs().max() > 1e-2
    batches.clear()
    pipe("a star", split_guidance=True, **{**options, "guidance_scale": 1.0})
    assert batches == [3, 3]


def test_frames_are_decoded_when_asked_for(load, clip):
    pipe = load("frame-by-frame")
    latents = pipe._encode_video(clip, 2)
    seen = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z: (seen.append(len(z)), decode(z))[1]
    chunks = decode_chunks(pipe.vae, latents, 2)
    first = next(chunks)
    assert seen == [2] and not first.requires_grad
    assert torch.is_grad_enabled(), "the caller's mode is its own"
    whole = decode_latents(pipe.vae, latents, 8)
    torch.testing.assert_close(torch.cat([first, *chunks]), whole)


def test_inversion_and_sampling_return_to_the_clip():
    """The round trip of the shipped model: guidance 1, the inversion's prompt, its own world."""
    from tvkernels.demo.world import edit_pair

    source = edit_pair(0)[0].render(64, 64)
    pipe = pipeline_class("frame-by-frame").from_pretrained(MODEL_DIR)
    pipe.set_progress_bar_config(disable=True)
    frames = source.frames[:2]
    clean = pipe._encode_video(frames, 2)
    errors = []
    for steps in (5, 40):
        pipe.invert(frames, num_inference_steps=steps)
        back = pipe("", num_inference_steps=steps, guidance_scale=1.0, output_type="latent")
        errors.append((back.frames - clean).pow(2).mean().sqrt().item())
    assert errors[1] < errors[0] / 2, errors
    assert errors[1] < 0.1 * clean.std().item(), errors


def test_the_same_seed_gives_the_same_bytes(load, clip):
    results = []
    for seed in (1, 1, 2):
        pipe = load().fit(clip, PROMPT, num_steps=2, generator=seeded(seed))
        pipe.invert(clip, num_inference_steps=2)
        results.append(pipe("a star", num_inference_steps=2, output_type="np").frames)
    assert np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_fitting_again_starts_afresh(load, clip):
    pipe = load()
    first = pipe.fit(clip, PROMPT, num_steps=2, generator=seeded()).handle.tuned_state()
    second = pipe.fit(clip, PROMPT, num_steps=2, generator=seeded()).handle.tuned_state()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tuning_lowers_the_loss_and_touches_the_tuned_alone(load, clip):
    pipe = load("ei2")
    frozen = {n: p.clone() for n, p in pipe.unet.named_parameters() if not p.requires_grad}
    losses = []
    progress = pipe.progress_bar

    def recording(*args, **kwargs):
        bar = progress(*args, **kwargs)
        bar.set_postfix = lambda loss: losses.append(float(loss))
        return bar

    pipe.progress_bar = recording
    pipe.fit(clip, PROMPT, num_steps=40, learning_rate=1e-2, generator=seeded())
    assert sum(losses[-10:]) < sum(losses[:10])
    assert all(torch.equal(frozen[n], p) for n, p in pipe.unet.named_parameters() if n in frozen)


def test_gradient_checkpointing_changes_nothing(load, clip):
    states = [
        load()
        .fit(clip, PROMPT, num_steps=2, generator=seeded(), gradient_checkpointing=on)
        .handle.tuned_state()
        for on in (False, True)
    ]
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-5, atol=1e-6)


def test_removing_the_handle_gives_the_loaded_unet_back(load, clip):
    pipe = load()
    pipe.handle.remove()
    before = {n: t.clone() for n, t in pipe.unet.state_dict().items()}
    pipe = load().fit(clip, PROMPT, num_steps=2, generator=seeded())
    pipe.handle.remove()
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_callback_sees_and_changes_tensors_and_interrupt_leaves_the_loop(load, clip):
    pipe = load("frame-by-frame")
    pipe.invert(clip, num_inference_steps=3)
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), sorted(tensors)))
        pipe._interrupt = step == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    out = pipe(
        "a star", num_inference_steps=3, output_type="latent", callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )  # fmt: skip
    assert [s[0] for s in seen] == [0, 1] and seen[0][2] == ["latents", "prompt_embeds"]
    assert not out.frames.any()
    with pytest.raises(ValueError, match="latnts"):
        pipe("", callback_on_step_end_tensor_inputs=["latnts"])


def test_diffusers_own_callback_cuts_guidance_off_and_what_it_changes_in_place_counts(load, clip):
    pipe = load("frame-by-frame")
    start = pipe.invert(clip, num_inference_steps=4)
    options = {"num_inference_steps": 4, "output_type": "latent"}
    cut = SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    found = pipe("a star", latents=start, callback_on_step_end=cut, **options).frames

    def by_hand(pipe, step, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"][-1:]} if step == 2 else {}

    wanted = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    expected = pipe("a star", latents=start, callback_on_step_end=by_hand, **wanted, **options)
    assert torch.equal(found, expected.frames) and pipe.num_timesteps == 4
    assert not torch.equal(found, pipe("a star", latents=start, **options).frames)

    def in_place(pipe, step, timestep, tensors):
        tensors["prompt_embeds"].zero_()
        return tensors

    def anew(pipe, step, timestep, tensors):
        return {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])}

    changed, expected = (
        pipe("a star", latents=start, callback_on_step_end=callback, **wanted, **options).frames
        for callback in (in_place, anew)
    )
    assert torch.equal(changed, expected) and not torch.equal(changed, found)


def test_prompts_are_strings_and_none_is_no_negative_one(load, clip):
    pipe = load("frame-by-frame")
    start = pipe.invert(clip, num_inference_steps=1)
    run = partial(pipe, latents=start, num_inference_steps=1, output_type="latent")
    assert torch.equal(run("a star", negative_prompt=None).frames, run("a star").frames)
    with pytest.raises(ValueError, match="a prompt is one string"):
        run(["a star", "a ring"])


def test_a_uint8_tensor_is_a_clip_and_other_ranges_are_refused(load, clip):
    pipe = load("frame-by-frame")
    expected = pipe.invert(clip, num_inference_steps=1)
    tensor = torch.from_numpy(clip).permute(0, 3, 1, 2)
    assert torch.equal(pipe.invert(tensor, num_inference_steps=1), expected)
    for video in (tensor.float(), tensor / 127.5 - 1, tensor.long(), tensor / 255 * float("nan")):
        with pytest.raises(ValueError, match="give a clip as floats in .0, 1."):
            pipe.invert(video)


def test_any_scheduler_given_first_or_later_is_its_noise_schedule(load, clip, folder, tmp_path):
    ours = load("frame-by-frame")
    expected = ours.invert(clip, num_inference_steps=3)
    copytree(folder, tmp_path / "model")
    euler = EulerDiscreteScheduler.from_config(ours.scheduler.config, timestep_spacing="linspace")
    euler.save_pretrained(tmp_path / "model" / "scheduler")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text(encoding="utf-8"))
    index["scheduler"][1] = "EulerDiscreteScheduler"
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    loaded = pipeline_class("frame-by-frame").from_pretrained(tmp_path / "model")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(loaded.invert(clip, num_inference_steps=3), expected)
    for other in (UniPCMultistepScheduler, PNDMScheduler):
        ours.scheduler = other.from_config(ours.scheduler.config)
        assert type(ours.scheduler) is DDIMScheduler
        assert torch.equal(ours.invert(clip, num_inference_steps=3), expected)
    ours.scheduler = DDIMScheduler.from_config(ours.scheduler.config, timestep_spacing="trailing")
    assert ours.inverse_scheduler.config.timestep_spacing == "trailing"
    assert not torch.equal(ours.invert(clip, num_inference_steps=3), expected)


def test_the_vae_may_be_wider_than_the_unet(load, clip):
    pipe = load("frame-by-frame").to(torch.bfloat16)
    pipe.vae.to(torch.float32)
    assert pipe.invert(clip, num_inference_steps=1).dtype == torch.float32
    assert pipe("x", num_inference_steps=1, output_type="pt").frames.isfinite().all()


def test_layers_are_not_offloaded_one_by_one(load):
    with pytest.raises(ValueError, match="use enable_model_cpu_offload"):
        load().enable_sequential_cpu_offload()


def test_construction_leaves_torchs_generators_alone(load, monkeypatch):
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("all devices are seeded"))
    before = torch.get_rng_state()
    load()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", ["ei2", "tcve", "frame-by-frame"])
def test_what_is_saved_is_the_plain_model_and_what_was_tuned(load, clip, method, folder, tmp_path):
    pipe = load(method)
    steps = {"num_steps": 2, "learning_rate": 1e-2} if method != "frame-by-frame" else {}
    pipe.fit(clip, PROMPT, generator=seeded(), **steps)
    start = pipe.invert(clip, num_inference_steps=2)
    options = {"latents": start, "num_inference_steps": 2, "output_type": "latent"}
    expected = pipe("a star", **options).frames
    pipe.save_pretrained(tmp_path)
    assert torch.equal(pipe("a star", **options).frames, expected)
    again = pipeline_class(method).from_pretrained(tmp_path)
    assert torch.equal(again("a star", **options).frames, expected)
    plain, loaded = (
        StableDiffusionPipeline.from_pretrained(path, safety_checker=None).unet.state_dict()
        for path in (folder, tmp_path)
    )
    assert plain.keys() == loaded.keys()
    assert all(torch.equal(plain[name], tensor) for name, tensor in loaded.items())
    again.fit(clip, PROMPT, generator=seeded(), **steps)  # from the model as it was
    assert torch.equal(again("a star", **options).frames, expected)
    pipeline_class("tune-a-video").from_pretrained(tmp_path)
    for path in tmp_path.glob("*-tuned.safetensors"):
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
        with pytest.raises(ModelError, match="tuned.safetensors is broken: save it again"):
            pipeline_class(method).from_pretrained(tmp_path)


def test_small_updates_add_up_in_bfloat16(load, clip):
    """One of 3e-5 is less than half the last bit of a weight of 0.01."""
    pipe = load().to(torch.bfloat16)
    pipe.fit(clip, PROMPT, num_steps=0)
    before = pipe.handle.tuned_state()
    pipe.fit(clip, PROMPT, num_steps=20, learning_rate=3e-5, generator=seeded())
    name = next(n for n in before if n.endswith("attn1.to_q.weight"))
    large = before[name].abs() > 0.02
    moved = before[name][large] != pipe.handle.tuned_state()[name][large]
    assert large.sum() > 50 and moved.float().mean() > 0.1  # 0 without
    assert {p.grad for p in pipe.unet.parameters()} == {None}


def test_a_tuning_that_is_cut_off_keeps_nothing_and_leaves_a_pipeline(load, clip, tmp_path):
    pipe, cache = load(), Cache(tmp_path)
    step = torch.optim.AdamW.step

    def interrupted(self, *args, **options):
        step(self, *args, **options)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        pipe.fit(clip, PROMPT, num_steps=3, cache=cache, gradient_checkpointing=True)
    assert not pipe.unet.training and not pipe.unet.is_gradient_checkpointing
    assert not list(tmp_path.iterdir())
    pipe.invert(clip, num_inference_steps=1, cache=cache)
    before = pipe("a star", num_inference_steps=1, output_type="latent").frames
    with pytest.raises(ValueError, match="multiples of 8"):
        pipe.fit(np.zeros((2, 30, 32, 3), np.uint8), PROMPT, num_steps=1)
    assert torch.equal(pipe("a star", num_inference_steps=1, output_type="latent").frames, before)


def test_without_inversion_sampling_starts_from_seeded_noise(load, clip):
    pipe = load()
    with pytest.raises(ValueError, match="nothing to edit"):
        pipe("a star")
    pipe.fit(clip, PROMPT, num_steps=0)
    a, b, c = (
        pipe("a star", num_inference_steps=1, output_type="latent", generator=seeded(s)).frames
        for s in (0, 0, 1)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_settings_and_recipes_are_data(load, clip):
    recipe = ABLATIONS["tav-instance-norm"]
    published = pipeline_class("tune-a-video").settings
    settings = dataclasses.replace(published, recipe=recipe, steps=2)
    pipe = load("tune-a-video", settings=settings)
    pipe.invert(clip)
    assert pipe.handle.recipe is recipe
    assert pipe("x", output_type="latent").frames.shape == (3, 4, 4, 6)


def test_cache_skips_what_was_done_and_recomputes_what_is_broken(load, clip, tmp_path, caplog):
    cache = Cache(tmp_path)

    def run():
        pipe = load()
        tuned = []
        tune = pipe._tune
        pipe._tune = lambda *a: (tuned.append(True), tune(*a))
        pipe.fit(clip, PROMPT, num_steps=1, generator=seeded(), cache=cache)
        noise = pipe.invert(clip, num_inference_steps=2, cache=cache)
        return bool(tuned), noise

    first, noise = run()
    assert first and len(list(tmp_path.iterdir())) == 2
    again, kept = run()
    assert not again and torch.equal(noise, kept)
    for path in tmp_path.iterdir():
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        again, kept = run()
    assert again and torch.equal(noise, kept)
    assert "checksum" in caplog.text
    next(iter(tmp_path.iterdir())).write_bytes(b"short")
    assert run()[1].equal(noise)


def test_cache_writes_nothing_by_halves(tmp_path, monkeypatch, caplog):
    cache = Cache(tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tvkernels.pipelines.cache.save_file", full)
    with caplog.at_level(logging.WARNING):
        cache.save("key", {"x": torch.ones(2)})
    assert "No space" in caplog.text  # the work goes on without being kept
    assert not list(tmp_path.iterdir())


def test_cache_keys_follow_content(load, clip):
    pipe = load()
    pipe.handle.remove()
    latents = pipe._encode_video(clip, 8)

    def key(**changes):
        parts = {"latents": latents, "text": latents, "steps": 2, "rate": 1.0}
        return pipe._key(**{**parts, **changes})

    keys = {key(), key(text=-latents), key(steps=3), key(rate=2.0), key(latents=latents + 1)}
    assert len(keys) == 5 and key() in keys
    with torch.no_grad():
        pipe.unet.conv_in.bias += 1
    assert key() not in keys
    assert content_key(a=torch.ones(2)) != content_key(a=torch.ones(2, 1))


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.zeros((2, 30, 32, 3), np.uint8), "multiples of 8"),
        (np.zeros((0, 32, 32, 3), np.uint8), "video must be"),
        (np.zeros((2, 32, 32), np.uint8), "video must be"),
        ([PIL.Image.new("RGB", (32, 32)), PIL.Image.new("RGB", (40, 32))], "several sizes"),
    ],
)
def test_clips_that_do_not_fit_are_refused(load, video, message):
    with pytest.raises(ValueError, match=message):
        load("frame-by-frame").invert(video)


def test_models_of_other_kinds_are_refused(folder, tmp_path):
    with pytest.raises(ModelError, match="SDXL"):
        check_unet({"addition_embed_type": "text_time"})
    with pytest.raises(ModelError, match="UNet3D"):
        check_unet({"_class_name": "UNet3DConditionModel"})
    with pytest.raises(ModelError, match="9 channels"):
        check_unet({"in_channels": 9})
    with pytest.raises(ModelError, match="model_index"):
        check_model(tmp_path)
    (tmp_path / "model_index.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="unet"):
        check_model(tmp_path)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(
        json.dumps({"in_channels": 9}), encoding="utf-8"
    )
    with pytest.raises(ModelError, match="9 channels"):
        check_model(tmp_path)
    with pytest.raises(ModelError, match="no folder"):
        check_model(tmp_path / "absent" / "model")
    check_model(folder)


def test_v_prediction_and_float16_tuning_are_refused(load, folder, clip):
    pipe = load()
    parts = {**pipe.components, "scheduler": DDIMScheduler(prediction_type="v_prediction")}
    pipe.handle.remove()
    with pytest.raises(ModelError, match="v_prediction"):
        OneShotPipeline(**parts)
    pipe = load().to(torch.float16)
    with pytest.raises(ValueError, match="float16"):
        pipe.fit(clip, PROMPT, num_steps=1)


def test_steps_asked_of_a_method_that_tunes_nothing_are_refused(load, clip):
    with pytest.raises(ValueError, match="tunes nothing"):
        load("frame-by-frame").fit(clip, PROMPT, num_steps=3)


def test_unknown_methods_name_the_known():
    with pytest.raises(ValueError, match="tune-a-video"):
        pipeline_class("tune-a-vid")
