"""Which models these pipelines can run, told from their configuration files alone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path


class ModelError(ValueError):
    """The model is not one these pipelines can run; one line that says what to do."""


def check_model_folder(model: str | Path) -> None:
    """Looks at a local model directory before anything is loaded; a hub name passes.

    Raises:
        ModelError: no diffusers model, no UNet, or not the SD-1.x family.
    """
    folder = Path(model)
    if not folder.is_dir():
        if folder.exists() or len(folder.parts) > 2 or str(model).startswith((".", "/", "~")):
            raise ModelError(f"{model} is not a model directory: give one in diffusers' layout")
        return
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"{folder} has no model_index.json: give a model in diffusers' layout")
    check_unet(_read(folder / "unet" / "config.json"))


def check_unet(config: Mapping) -> None:
    """Refuses UNets that are not of the SD-1.x family, from their configuration.

    Raises:
        ModelError: SDXL, a video UNet, or inputs other than four latent channels.
    """
    kind = config.get("_class_name", "UNet2DConditionModel")
    if kind != "UNet2DConditionModel":
        raise ModelError(f"the model's UNet is a {kind}: give a Stable Diffusion 1.x model")
    if config.get("addition_embed_type"):
        raise ModelError("this is an SDXL model: give a Stable Diffusion 1.x model")
    if config.get("in_channels", 4) != 4:
        raise ModelError(
            f"the UNet takes {config['in_channels']} channels (an inpainting or depth model): "
            "give a plain Stable Diffusion 1.x model"
        )


def model_size(model: str | Path) -> tuple[int, int]:
    """Pixels of the square the model was trained on, and what both sides must divide by.

    Reads a local directory's configuration files; of a hub name only those are fetched.

    Raises:
        ModelError: no such model, or not one of the SD-1.x family.
    """
    folder = Path(model)
    if folder.is_dir():
        check_model_folder(folder)
        unet, vae = (_read(folder / part / "config.json") for part in ("unet", "vae"))
    else:
        check_model_folder(model)
        unet, vae = _fetch(str(model))
        check_unet(unet)
    multiple = 2 ** (len(vae.get("block_out_channels", (0,))) - 1)
    # diffusers' own default where the configuration is silent: 64 latents, 512 pixels.
    return (unet.get("sample_size") or 64) * multiple, multiple


def _read(config: Path) -> dict:
    if not config.is_file():
        part = config.parent.name
        raise ModelError(
            f"{config.parent.parent} has no {part}/config.json: give a Stable Diffusion 1.x model"
        )
    try:
        return json.loads(config.read_text())
    except (ValueError, OSError) as error:
        raise ModelError(f"{config} cannot be read: {error}") from None


def _fetch(name: str) -> tuple[dict, dict]:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    try:
        with warnings.catch_warnings():
            # diffusers 0.42 passes huggingface_hub an argument that this one calls deprecated.
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
            unet = UNet2DConditionModel.load_config(name, subfolder="unet")
            vae = AutoencoderKL.load_config(name, subfolder="vae")
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"cannot load the model {name}: {reason}") from error
    return dict(unet), dict(vae)
