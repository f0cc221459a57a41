"""The benchmarks' references: each computes what our pipeline computes, on the shapes world."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import DDIMScheduler
from tiny_unets import assert_rounding, clip_inputs, run_clip, seeded, tiny_unet

from tvkernels import atlas_splat, inflate
from tvkernels.atlas import AtlasSettings, train_atlas
from tvkernels.atlas.keys import median
from tvkernels.benchmarks.reference import REFERENCES, load_reference
from tvkernels.demo import MODEL_DIR
from tvkernels.demo.settings import method_numbers
from tvkernels.demo.world import heldout_scene
from tvkernels.pipelines import pipeline_class
from tvkernels.pipelines.loading import load_pipeline
from tvkernels.pipelines.stable_video import _Job
from tvkernels.recipes import TCVE_PAPER, TUNE_A_VIDEO
from tvkernels.testing.budget import assert_error_budget

SCENE = heldout_scene(1, num_frames=3)
SOURCE, TARGET = SCENE.caption, SCENE.edit("purple", "star").caption
STEPS, GUIDANCE = 2, 5.0
# StableVideo edits pictures: a test of its own.
CLIPS = [name for name in REFERENCES if name != "stable-video"]
TUNED = [name for name in REFERENCES if pipeline_class(name).settings.recipe.tuned]
ADDED = ("attn_temp", "temporal_unet")


def load(method, dtype=torch.float32):
    """Our pipeline with the demo's numbers; what inflation adds is nowhere zero."""
    settings, _ = method_numbers(method, True)
    pipe = load_pipeline(method, str(MODEL_DIR), settings=settings)
    pipe.set_progress_bar_config(disable=True)
    randomise(pipe.unet)
    return pipe.to(dtype)


@torch.no_grad()
def randomise(unet):
    generator = seeded(7)
    for name, parameter in unet.named_parameters():
        if any(part in name for part in ADDED):
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


@cache
def clip():
    """uint8 [3, 48, 64, 3]: latents of 6 x 8, which halve to 1 x 1."""
    return SCENE.render(48, 64).frames


def latents(pipe):
    return pipe._encode_video(clip(), 8).to(pipe.unet.dtype)


def told(pipe):
    """What the inversion is told."""
    own = pipe.settings.recipe.name != "blended-diffusion"
    return pipe.settings.inversion_prompt if own else SOURCE


def edit(pipe):
    """Our noise and edited latents."""
    own = {"source_prompt": SOURCE} if told(pipe) == SOURCE else {}
    noise = pipe.invert(clip(), num_inference_steps=STEPS, **own)
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    return noise, pipe(TARGET, output_type="latent", **options).frames


def edit_plainly(pipe, start):
    """The reference's."""
    reference = load_reference(pipe)
    noise = reference.invert(start, told(pipe), STEPS)
    return noise, reference.sample(noise, TARGET, STEPS, GUIDANCE)


@pytest.mark.parametrize("method", CLIPS)
def test_edits_as_ours(method):
    """Equal in float64; in float32 ours is no further from that than the reference is."""
    narrow, wide = load(method), load(method, torch.float64)
    start = latents(narrow)
    wide._encode_video = lambda video, chunk: start.double()
    exact = edit_plainly(wide, start.double())
    for found, expected in zip(edit(wide), exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    both = zip(edit(narrow), edit_plainly(narrow, start), exact, strict=True)
    for (found, low, truth), what in zip(both, ("noise", "edit"), strict=True):
        assert (found - start).abs().max() > 0.1
        assert_error_budget(found, low, truth, what=what)


@pytest.mark.parametrize("method", TUNED)
def test_tunes_as_ours(method):
    """The same weights after two steps; until then it had its own copies of ours."""
    pipe = load(method, torch.float64)
    with torch.no_grad():
        pipe.unet.conv_out.weight *= 30  # gradients that are clipped
    start, reference = latents(pipe), load_reference(pipe)
    before = pipe.handle.tuned_state()
    pipe._tune(start, pipe._encode_prompts([SOURCE]), 2, 1e-3, seeded(5))
    found = reference.unet.train().state_dict()
    assert all(torch.equal(found[reference.rename(n)], t) for n, t in before.items())
    reference.tune(start, SOURCE, 2, 1e-3, seeded(5))
    found, after = reference.unet.train().state_dict(), pipe.handle.tuned_state()
    for name, tensor in after.items():
        torch.testing.assert_close(found[reference.rename(name)], tensor, rtol=1e-9, atol=1e-9)
    frozen = {n: t for n, t in pipe.unet.state_dict().items() if n not in before}
    assert all(torch.equal(found[reference.rename(n)], t) for n, t in frozen.items())
    reference.load(pipe.unet.state_dict())
    tuned = load_reference(pipe).unet.state_dict()
    for name, tensor in reference.unet.state_dict().items():
        assert torch.equal(tensor, tuned[name]) or name.startswith(reference.dead), name
    still = [name for name, tensor in after.items() if torch.equal(tensor, before[name])]
    # Softmax over one frame, which three leave in the temporal U-Net's middle, has no slope.
    assert all("stb" in name and name.endswith(("to_q.weight", "to_k.weight")) for name in still)


def test_stable_videos_key_frames_as_ours(monkeypatch):
    """Each edit and what carries it into the next, and the median of the partial atlases."""
    quick = AtlasSettings(steps=5, points=2048)
    scene = SCENE.render(64, 64)
    atlas = train_atlas(scene.frames, [scene.masks > 0.5], quick, generator=seeded())
    uv, alpha, size = atlas.uv_maps(0), atlas.alphas()[0].flatten(1), atlas.layers[0].size
    edits, inner = [], _Job.edit
    monkeypatch.setattr(_Job, "edit", lambda *args: edits.append(inner(*args)) or edits[-1])
    plain = {}
    for dtype in (torch.float64, torch.float32):
        pipe = load("stable-video", dtype)
        pipe.settings = replace(pipe.settings, aggregation="median", steps=3)
        pipe.fit(scene.frames, atlas=atlas)
        reference = load_reference(pipe)
        plain[dtype], joined = reference.edit_keys(pipe._pixels, uv, alpha, size, TARGET, 3, 5.0)
    pipe(TARGET, guidance_scale=5.0, output_type="pt")
    assert len(edits) == len(scene.frames) == 3, "every frame is a key"
    for own, found, exact, low in zip(pipe._pixels, edits, *plain.values(), strict=True):
        assert (found - own).abs().max() > 0.1
        assert_error_budget(found, low, exact)
    parts = (
        atlas_splat(edit.flatten(1).T[None], uv[f][None], size, weight=alpha[f][None])
        for f, edit in enumerate(plain[torch.float32])
    )
    pictures, covers = zip(*((x[0], y[0]) for x, y in parts), strict=True)
    assert_rounding(joined, median(pictures, covers))
    with pytest.raises(ValueError, match="stable-video tunes nothing"):
        reference.tune(edits[0], SOURCE, 1, 1e-3)


@pytest.mark.parametrize("attention", ["math", "sdpa"])
@pytest.mark.parametrize("method", REFERENCES)
@torch.no_grad()
def test_any_width_and_either_attention(method, attention, monkeypatch):
    unet = tiny_unet(block_out_channels=(16, 24, 40, 56), norm_num_groups=8).double()
    settings = pipeline_class(method).settings
    inflate(unet, settings.recipe, generator=seeded())
    randomise(unet)
    sample, t, text = (x.double() if x.is_floating_point() else x for x in clip_inputs(2, 5))
    sample[5:] = sample[:5]  # one clip under two texts
    expected = run_clip(unet, sample, t, text, 5)
    others = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    pipe = SimpleNamespace(settings=settings, unet=unet, scheduler=DDIMScheduler(), **others)
    reference, fused = load_reference(pipe, attention=attention), []
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "torch.nn.functional.scaled_dot_product_attention",
        lambda *args, **options: fused.append(1) or kernel(*args, **options),
    )
    found = reference.predict(sample[:5], t, text).flatten(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert bool(fused) == (attention == "sdpa")


def test_what_has_no_reference_is_refused():
    pipe = SimpleNamespace(settings=SimpleNamespace(recipe=TCVE_PAPER))
    with pytest.raises(ValueError, match="no reference of tcve-paper: there is one of .*ei2"):
        load_reference(pipe)
    pipe.settings.recipe = TUNE_A_VIDEO
    with pytest.raises(ValueError, match="attention 'flash': use one of math, sdpa"):
        load_reference(pipe, attention="flash")
    pipe = load("frame-by-frame")
    with pytest.raises(ValueError, match="frame-by-frame tunes nothing"):
        load_reference(pipe).tune(latents(pipe), SOURCE, 1, 1e-3)
