"""A random SD-1.x model in miniature, and pipelines of it."""

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tvkernels.demo import MODEL_DIR
from tvkernels.pipelines import pipeline_class


def save_model(path):
    """In diffusers' layout, with SD-1.4's PNDM scheduler; gives the folder back."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(16, 32, 32, 32), layers_per_block=1,
        norm_num_groups=8, cross_attention_dim=16, attention_head_dim=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    tokenizer = CLIPTokenizer.from_pretrained(MODEL_DIR / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length,
    )  # fmt: skip
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae, CLIPTextModel(config), tokenizer, unet, scheduler, None, None,
        requires_safety_checker=False,
    ).save_pretrained(path)  # fmt: skip
    return path


def loader(folder):
    """What loads a method's pipeline from there."""

    def load(method="ei2", **kwargs):
        pipe = pipeline_class(method).from_pretrained(folder, **kwargs)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


def noisy_clip():
    """uint8 [3, 32, 48, 3]."""
    return np.random.default_rng(0).integers(0, 255, (3, 32, 48, 3), dtype=np.uint8)
