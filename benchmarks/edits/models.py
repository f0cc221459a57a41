"""Models that a pipeline is measured on: the embedded one, a folder's, or SD-1.5's shapes."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tvkernels.config import EMBEDDED, ConfigError
from tvkernels.demo import MODEL_DIR
from tvkernels.demo.settings import method_numbers
from tvkernels.devices import pick_device
from tvkernels.pipelines import pipeline_class
from tvkernels.pipelines.checks import ModelError
from tvkernels.pipelines.loading import load_pipeline
from tvkernels.pipelines.one_shot import OneShotPipeline

# Stable Diffusion 1.5's own configurations, where they are not the classes' defaults.
SD15_UNET = {"sample_size": 64, "cross_attention_dim": 768}
SD15_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
SD15_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "vocab_size": 49408,
}
HALF_UNET = SD15_UNET | {"sample_size": 32, "block_out_channels": (160, 320, 640, 640)}
# Name -> the UNet that gets random weights; nothing of its edits can be looked at.
RANDOM = {"half-sd": HALF_UNET, "sd15": SD15_UNET}
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


def load(
    method: str, model: str = EMBEDDED, *, backend: str = "auto", dtype: str = "float32"
) -> OneShotPipeline:
    """A method's pipeline on the device there is, with the method's numbers for that model.

    Args:
        method: a name of `METHODS`.
        model: "embedded", a name of `RANDOM`, a folder or a hub name.
        backend: of the attention ops.
        dtype: a name of `DTYPES`.
    Raises:
        ConfigError: no such model.
    """
    # `to` warns of every model that there is nothing to keep in float32.
    diffusers.utils.logging.set_verbosity_error()
    settings, _ = method_numbers(method, model == EMBEDDED)
    if model in RANDOM:
        parts = random_parts(RANDOM[model])
        pipe = pipeline_class(method)(**parts, settings=settings, backend=backend)
        pipe.to(pick_device())
    else:
        folder = str(MODEL_DIR) if model == EMBEDDED else model
        try:
            pipe = load_pipeline(method, folder, backend, settings=settings)
        except ModelError as error:
            others = ", ".join((EMBEDDED, *RANDOM))
            raise ConfigError(f"{error}; or use one of {others}") from None
    if dtype != "float32":
        pipe.to(dtype=DTYPES[dtype])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_parts(unet: dict, seed: int = 0) -> dict:
    """The models of a pipeline around a UNet of random weights, the same for the same seed.

    Text encoder and VAE are small: no step that is measured runs the VAE, and text is encoded
    once for all of them. Layers that start at zero are drawn too, else nothing would reach the
    output.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = UNet2DConditionModel(**unet).eval()
        config = CLIPTextConfig.from_pretrained(MODEL_DIR, subfolder="text_encoder")
        config.update({"hidden_size": net.config.cross_attention_dim, "num_attention_heads": 4})
        text = CLIPTextModel(config).eval()
        vae = AutoencoderKL(**SD15_VAE | {
            "block_out_channels": (32,) * 4, "layers_per_block": 1
        }).eval()  # fmt: skip
    return {
        "unet": net, "text_encoder": text, "vae": vae,
        "tokenizer": CLIPTokenizer.from_pretrained(MODEL_DIR, subfolder="tokenizer"),
        "scheduler": DDIMScheduler.from_pretrained(MODEL_DIR, subfolder="scheduler"),
    }  # fmt: skip


def check(model: str) -> None:
    """Refuses what is neither a known name nor a folder, before anything is measured.

    Raises:
        ConfigError: in one line.
    """
    if model in (EMBEDDED, *RANDOM) or Path(model).is_dir() or model.count("/") == 1:
        return
    raise ConfigError(
        f"unknown model {model!r}: use {', '.join((EMBEDDED, *RANDOM))}, a folder or a hub name"
    )
