"""The shipped model: its files, tokenizer, autoencoder and what it draws."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from tvkernels.demo import MODEL_DIR, metrics, tokenizer
from tvkernels.demo.world import Scene, heldout_scene


@pytest.fixture(scope="module")
def pipeline():
    loaded = StableDiffusionPipeline.from_pretrained(MODEL_DIR)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def training():
    return json.loads((MODEL_DIR / "training.json").read_text(encoding="utf-8"))


def test_directory_is_small_and_complete():
    files = [path for path in MODEL_DIR.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15 * 2**20
    names = {str(path.relative_to(MODEL_DIR)) for path in files}
    assert {"model_index.json", "training.json", "LICENSE", "README.md"} <= names
    assert not any(name.endswith(".partial") for name in names)


def test_loads_in_float32_with_the_shape_of_stable_diffusion(pipeline):
    for module in (pipeline.vae, pipeline.unet, pipeline.text_encoder):
        assert {p.dtype for p in module.parameters()} == {torch.float32}
    config = pipeline.unet.config
    assert tuple(config.down_block_types) == ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    assert tuple(config.up_block_types) == ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    assert config.layers_per_block == 2 and config.attention_head_dim == 8
    assert pipeline.vae_scale_factor == 8 and pipeline.vae.config.latent_channels == 4
    scheduler = pipeline.scheduler.config
    assert scheduler.prediction_type == "epsilon" and scheduler.steps_offset == 1
    assert not scheduler.clip_sample and not scheduler.set_alpha_to_one
    assert pipeline.safety_checker is None


def test_every_word_of_the_world_is_one_token(pipeline):
    ids = pipeline.tokenizer(tokenizer.words()).input_ids
    assert all(len(row) == 3 for row in ids)
    assert len({row[1] for row in ids}) == len(tokenizer.words())


@pytest.mark.parametrize(
    "prompt",
    ["", "a red circle", "Zürich, 4K!", "日本語の動画", "🎬🐈‍⬛", "\x00\t\n", "naïve ﬁancée" * 40],
)
def test_any_prompt_tokenizes(pipeline, prompt):
    rows = pipeline.tokenizer(
        prompt, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    ).input_ids
    assert rows.shape == (1, 77)
    assert rows.max() < pipeline.text_encoder.config.vocab_size
    text = pipeline.text_encoder(rows)[0]
    assert text.shape == (1, 77, pipeline.unet.config.cross_attention_dim)
    assert torch.isfinite(text).all()


def test_tokens_decode_to_the_prompt():
    loaded = CLIPTokenizer.from_pretrained(MODEL_DIR / "tokenizer")
    for text in (Scene.random(3, objects=2).caption, "zürich, 日本 🐈"):
        ids = loaded(text).input_ids
        decoded = loaded.decode(ids, skip_special_tokens=True)
        assert "".join(decoded.split()) == "".join(text.split())


@torch.no_grad()
def test_reconstruction_of_heldout_clips(pipeline, training):
    error = 0.0
    for i in range(4):
        frames = heldout_scene(i).render().frames
        x = torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1
        latents = pipeline.vae.encode(x).latent_dist.mean
        assert latents.shape == (8, 4, 16, 16)
        y = pipeline.vae.decode(latents).sample.clamp(-1, 1)
        error += ((y - x) / 2).square().mean().item() / 4
    psnr = -10 * np.log10(error)
    assert psnr >= min(30.0, training["figures"]["vae_psnr_db"]) - 1.5


def test_generated_pictures_show_what_the_prompt_says(pipeline, training):
    scenes = [heldout_scene(500 + i) for i in range(12)]
    pictures = pipeline(
        [scene.caption for scene in scenes],
        num_inference_steps=12,
        guidance_scale=training["figures"]["guidance"],
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    readings = [metrics.read(picture) for picture in pictures]
    pairs = list(zip(readings, (scene.objects[0] for scene in scenes), strict=True))
    color = sum(r is not None and r.color == thing.color for r, thing in pairs) / len(pairs)
    shape = sum(r is not None and r.shape == thing.shape for r, thing in pairs) / len(pairs)
    # Twelve pictures: three standard deviations below the recorded share.
    for share, name in ((color, "color"), (shape, "shape")):
        stated = training["figures"][name]
        assert share >= stated - 3 * np.sqrt(max(stated * (1 - stated), 0.02) / len(pairs))


def test_record_states_figures_settings_and_what_was_missed(training):
    figures, targets = training["figures"], training["targets"]
    assert targets == {"vae_psnr_db": 30.0, "color": 0.95, "shape": 0.90}
    assert training["missed"] == [name for name in targets if figures[name] < targets[name]]
    assert training["command"].startswith("python -m tvkernels.demo.train")
    assert {"vae", "unet"} <= {run["stage"] for run in training["stages"]}
    assert {"torch", "diffusers", "transformers", "numpy"} <= set(training["versions"])
