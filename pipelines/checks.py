"""Which models these pipelines can run, told from their configuration files alone."""

from __future__ import annotations

import json
import re
import socket
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import tvkernels
from tvkernels.pipelines.files import ModelError, check_embedding, check_lora, single_file_kind

__all__ = [
    "ModelError", "check_embedding", "check_lora", "check_model", "check_unet", "check_vae",
    "configuration", "latent_side", "model_size", "single_file_config", "vae_factor",
]  # fmt: skip
# Models that come in one file: the embedded one and Stable Diffusion 1.x. Their configurations and
# tokenizers ship with the package.
CONFIGS = (Path(tvkernels.__file__).parent / "demo" / "model", Path(__file__).parent / "sd15")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WEIGHTS = {
    "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
}  # fmt: skip
# Inputs that Stable Diffusion 1.x has not, by the UNet's setting -> what wants them.
OTHER_INPUTS = {
    "addition_embed_type": "an SDXL model",
    "class_embed_type": "a UNet with classes",
    "num_class_embeds": "a UNet with classes",
    "encoder_hid_dim_type": "a UNet with another text",
    "encoder_hid_dim": "a UNet with another text",
    "time_cond_proj_dim": "a UNet that was distilled for a guidance of its own (LCM); "
    "the plain model with LCM's LoRA does",
}


def check_model(model: str | Path, variant: str | None = None) -> None:
    """Whether a model is there and of the right family, before anything is loaded.

    Args:
        model: a folder in diffusers' layout, a .safetensors file in Stable Diffusion's, or a hub
            name, which is looked for in the local cache alone.
        variant: of the folder's files, such as fp16.
    Raises:
        ModelError: there is no such model or variant, a pickle, or not the SD-1.x family.
    """
    path, folder = Path(model), _configuration(model)
    if path == folder:
        for part, stem in WEIGHTS.items():
            _check_weights(path / part, stem, variant)
        if variant is not None and not any(path.glob(f"*/*.{variant}*.safetensors")):
            raise ModelError(f"{path} has no variant {variant}: leave it out")
    elif folder is not None and variant is not None:
        raise ModelError(f"{path} is one file and has no variant {variant}: leave it out")


def _configuration(model: str | Path) -> Path | None:
    """The folder with a model's configuration, of the right family; None for a hub name."""
    path = Path(model)
    if path.is_file() or path.suffix.lower() in (".safetensors", ".ckpt"):
        return single_file_config(path)
    if not path.is_dir():
        _check_hub_name(str(model))
        return None
    if not (path / "model_index.json").is_file():
        raise ModelError(f"{path} has no model_index.json: give a model in diffusers' layout")
    check_unet(_read(path / "unet" / "config.json"))
    _check_channels(_read(path / "vae" / "config.json"))
    return path


def _check_weights(folder: Path, stem: str, variant: str | None) -> None:
    names = [file.name for file in folder.glob("*")] if folder.is_dir() else []
    split = [re.sub(r"-\d+-of-\d+", "", name).split(".") for name in names]
    there = {parts[1] if len(parts) == 3 else None for parts in split
             if parts[0] == stem and parts[-1] == "safetensors"}  # fmt: skip
    if {variant, None} & there:  # a variant is of each part for itself, as in diffusers
        return
    others = " or ".join(sorted(filter(None, there)))
    if variant is None and others:
        raise ModelError(f"{folder} has nothing but variants: ask for variant {others}")
    if others:
        raise ModelError(f"{folder} has no variant {variant}: ask for {others}")
    if any(parts[0] in (stem, "pytorch_model") and parts[-1] == "bin" for parts in split):
        root = folder.parent
        raise ModelError(
            f"{folder} holds pickles, which can run any code when they are opened: convert the "
            'model by python -c "from diffusers import StableDiffusionPipeline as P; '
            f'P.from_pretrained({str(root)!r}).save_pretrained({str(root) + "-safe"!r})"'
        )
    raise ModelError(f"{folder} has no {stem}.safetensors: give a whole model")


def _check_hub_name(name: str) -> None:
    if not HUB_NAME.fullmatch(name):
        raise ModelError(
            f"{name} is no folder, no .safetensors file and no hub's name: give one of them, "
            "a hub's name as organisation/model"
        )
    from huggingface_hub import constants, try_to_load_from_cache

    kept = isinstance(try_to_load_from_cache(name, "model_index.json"), str)
    if kept:
        return
    if constants.HF_HUB_OFFLINE:
        raise ModelError(
            f"{name} is no folder and not in the local cache, and HF_HUB_OFFLINE is set: "
            "give a folder, or unset it"
        )
    if Path(name).parent.is_dir():
        raise ModelError(
            f"there is no {Path(name).name} in the folder {Path(name).parent}: give a model's "
            "folder, or a hub's name from another working directory"
        )
    host = urlsplit(constants.ENDPOINT)
    if getproxies():  # then a hub is not reached by its own address
        return
    try:  # the hub's client tries for half a minute
        socket.create_connection((host.hostname, host.port or 443), timeout=1).close()
    except OSError:
        raise ModelError(
            f"{name} is no folder and not in the local cache, and {host.hostname} does not "
            "answer: give a folder, or try again with a network"
        ) from None


def check_unet(config: Mapping) -> None:
    """Refuses UNets that are not of the SD-1.x family, from their configuration.

    Raises:
        ModelError: SDXL, a video UNet, or inputs other than four latent channels, a timestep and
            a text.
    """
    kind = config.get("_class_name", "UNet2DConditionModel")
    if kind != "UNet2DConditionModel":
        raise ModelError(f"the model's UNet is a {kind}: give a Stable Diffusion 1.x model")
    for name, what in OTHER_INPUTS.items():
        if config.get(name):
            raise ModelError(f"this is {what}: give a Stable Diffusion 1.x model")
    if config.get("in_channels", 4) != 4:
        raise ModelError(
            f"the UNet takes {config['in_channels']} channels (an inpainting or depth model): "
            "give a plain Stable Diffusion 1.x model"
        )
    if config.get("out_channels", 4) != 4:
        raise ModelError(
            f"the UNet gives {config['out_channels']} channels (a learned variance): "
            "give a plain Stable Diffusion 1.x model"
        )


def check_vae(vae: Any) -> None:
    """Refuses VAEs that do not turn pictures into four channels and back by themselves.

    Raises:
        ModelError: of video, of another number of channels, or one that draws noise of its own.
    """
    import inspect

    kind = type(vae).__name__
    _check_channels(vae.config)
    if {"num_frames", "num_inference_steps"} & set(inspect.signature(vae.decode).parameters):
        raise ModelError(f"the VAE {kind} decodes clips or draws noise: give an AutoencoderKL")


def _check_channels(vae: Mapping) -> None:
    channels = vae.get("in_channels", 3), vae.get("latent_channels", 4)
    if channels != (3, 4):
        raise ModelError(
            f"the VAE turns {channels[0]} channels into {channels[1]}, not 3 into 4: give one of "
            "Stable Diffusion 1.x"
        )


def vae_factor(config: Mapping) -> int:
    """Pixels to a latent along each side, of any VAE for images."""
    names = ("encoder_block_out_channels", "down_block_out_channels", "block_out_channels")
    blocks = next((config[name] for name in names if config.get(name)), (0,))
    return 2 ** (len(blocks) - 1)


def latent_side(config: Mapping) -> int:
    """Side of the latents that a UNet was trained on, the shorter one of two.

    diffusers' own default where the configuration is silent: 64.
    """
    size = config.get("sample_size") or 64
    return size if isinstance(size, int) else min(size)


def model_size(model: str | Path) -> tuple[int, int]:
    """Pixels of the shorter side the model was trained on, and what both sides must divide by.

    Reads a folder's or a file's configuration; of a hub name only the configuration is fetched.

    Raises:
        ModelError: no such model, or not one of the SD-1.x family.
    """
    unet, vae = (configuration(model, part) for part in ("unet", "vae"))
    check_unet(unet)
    return latent_side(unet) * vae_factor(vae), vae_factor(vae)


def configuration(model: str | Path, part: str) -> dict:
    """What a model's folder or file, or a hub, says of a part of the model.

    Args:
        model: as for `check_model`; of a hub name the configuration alone is fetched.
        part: "unet", "vae", "text_encoder" or "scheduler".
    Raises:
        ModelError: no such model, or not one of the SD-1.x family.
    """
    folder = _configuration(model)
    if folder is None:
        return _fetch(str(model), part)
    return _read(folder / part / f"{'scheduler_' * (part == 'scheduler')}config.json")


def tokenizer_place(model: str | Path) -> str:
    """The folder or hub name that has a model's tokenizer, in its `tokenizer`."""
    return str(_configuration(model) or model)


def single_file_config(path: str | Path) -> Path:
    """The folder with the configuration of a checkpoint in one file.

    Raises:
        ModelError: no such file, a pickle, no whole model, or one of another family.
    """
    known = {}
    for folder in CONFIGS:
        unet = _read(folder / "unet" / "config.json")
        known[folder] = unet["block_out_channels"][0], unet["cross_attention_dim"]
    return single_file_kind(path, known)


def _read(config: Path) -> dict:
    if not config.is_file():
        raise ModelError(
            f"{config.parent.parent} has no {config.parent.name}/{config.name}: "
            "give a Stable Diffusion 1.x model"
        )
    try:
        return json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{config} cannot be read: {error}") from None


def _fetch(name: str, part: str) -> dict:
    from diffusers import DDIMScheduler, UNet2DConditionModel

    try:
        with warnings.catch_warnings():
            # diffusers 0.42 passes huggingface_hub an argument that this one calls deprecated.
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
            kind = DDIMScheduler if part == "scheduler" else UNet2DConditionModel
            return dict(kind.load_config(name, subfolder=part))
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"cannot load the model {name}: {reason}") from error
