"""The demo model's networks: Stable Diffusion 1.x in miniature, and its directory on disk."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tvkernels.demo import tokenizer as vocabulary

SIZE = 128
TEXT_WIDTH = 128


def make_vae() -> AutoencoderKL:
    """Four levels (factor 8), 4 latent channels, 1.0 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,
    )


def make_unet() -> UNet2DConditionModel:
    """The block types of SD-1.5's UNet, a tenth as wide: 6.1 M parameters.

    `attention_head_dim=8` is the number of heads, as in SD-1.5: diffusers kept the name.
    """
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(48, 64, 96, 96),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
        norm_num_groups=16,
        use_linear_projection=False,
    )


def make_text_encoder() -> CLIPTextModel:
    """A CLIP text encoder of two layers over the world's vocabulary."""
    tokens, _ = vocabulary.build()
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=vocabulary.MAX_LENGTH,
        bos_token_id=tokens[vocabulary.START],
        eos_token_id=tokens[vocabulary.END],
        pad_token_id=tokens[vocabulary.END],
    )
    return CLIPTextModel(config)


def make_tokenizer() -> CLIPTokenizer:
    """The tokenizer as it is read back from disk."""
    with tempfile.TemporaryDirectory() as folder:
        vocabulary.save(Path(folder))
        return CLIPTokenizer.from_pretrained(folder)


def make_scheduler() -> DDIMScheduler:
    """SD-1.5's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def save_pipeline(
    out: Path,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    only: Collection[str] = (),
) -> None:
    """Writes the model in diffusers' layout, weights as float16 safetensors.

    Each file is replaced atomically, so a reader never meets half a file. With `only`, the
    folders it names are written and the rest is left as it is.
    """
    pipeline = StableDiffusionPipeline(
        vae=copy.deepcopy(vae).to(torch.float16),
        text_encoder=copy.deepcopy(text_encoder).to(torch.float16),
        tokenizer=make_tokenizer(),
        unet=copy.deepcopy(unet).to(torch.float16),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder)
        pipeline.save_pretrained(staged, safe_serialization=True)
        shutil.rmtree(staged / "tokenizer")
        vocabulary.save(staged / "tokenizer")
        for component in ("text_encoder", "unet", "vae"):
            _clean(staged / component / "config.json")
        for source in sorted(staged.rglob("*")):
            part = source.relative_to(staged)
            if source.is_file() and (not only or part.parts[0] in only):
                _replace(source, out / part)


def load_pipeline(directory: Path) -> StableDiffusionPipeline:
    """The model in float32, in evaluation mode, without a progress bar."""
    pipeline = StableDiffusionPipeline.from_pretrained(directory, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _clean(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    # Transformers 5 loads in the dtype that a config names, here the stored float16.
    if "dtype" in config:
        config["dtype"] = "float32"
    # The folder that a resumed training had loaded from says nothing elsewhere.
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _replace(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.copyfile(source, partial)
    os.replace(partial, target)
