"""An atlas on disk: one safetensors file, and a PNG of each layer for people to edit."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tvkernels import atlas_splat
from tvkernels._files import fingerprint
from tvkernels.atlas.model import LayeredAtlas
from tvkernels.video import VideoError, atomic_path
from tvkernels.video._files import need

MODEL = "atlas.safetensors"
FORMAT = "tvkernels-atlas-1"
LAYER = "tvkernels-layer"


class AtlasError(VideoError):
    """No atlas, a broken one, or a picture that does not belong to it. One line."""


def save_atlas(model: LayeredAtlas, folder: str | os.PathLike, info: Mapping[str, Any]) -> Path:
    """Writes the model and a PNG of each layer; each file appears whole or not at all.

    Args:
        model: the atlas.
        folder: made if missing.
        info: kept beside it, as JSON.
    Returns:
        The model's file.
    Raises:
        VideoError: it cannot be written, for instance because the disk is full.
    """
    safetensors = need("safetensors.torch")
    image, png = need("PIL.Image"), need("PIL.PngImagePlugin")
    folder = Path(folder)
    for name, picture in pictures(model).items():
        text = png.PngInfo()
        text.add_text(LAYER, name)
        with atomic_path(folder / f"{name}.png") as temporary:
            image.fromarray(picture).save(temporary, pnginfo=text)
    tensors = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    metadata = {"format": FORMAT, "info": json.dumps(dict(info)), "checksum": fingerprint(tensors)}
    with atomic_path(folder / MODEL) as temporary:
        try:
            safetensors.save_file(tensors, temporary, metadata)
        except need("safetensors").SafetensorError as error:  # its way to say a full disk
            raise VideoError(f"cannot write {folder / MODEL}: {error}") from error
    return folder / MODEL


def load_atlas(path: str | os.PathLike) -> tuple[LayeredAtlas, dict[str, Any]]:
    """The atlas in a folder or file that `save_atlas` wrote, and what was kept beside it.

    Raises:
        AtlasError: none there, another kind of file, or one that fails its checksum.
    """
    safetensors = need("safetensors")
    path = Path(path)
    path = path if path.suffix == ".safetensors" else path / MODEL
    if not path.is_file():
        raise AtlasError(f"no atlas in {path.parent}: `tvk atlas CLIP -o {path.parent}` makes one")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise AtlasError(f"{path} cannot be read ({error}): make the atlas again") from error
    if metadata.get("format") != FORMAT:
        raise AtlasError(f"{path} is no atlas of `tvk atlas`")
    if metadata.get("checksum") != fingerprint(tensors):
        raise AtlasError(f"{path} fails its checksum: make the atlas again")
    return from_state(tensors), json.loads(metadata["info"])


def from_state(tensors: Mapping[str, Tensor]) -> LayeredAtlas:
    """The model that these weights are of."""
    opacity = [tensors[n] for n in sorted(n for n in tensors if n.startswith("logits."))]
    affines = [tensors[f"layers.{i}.affine"] for i in range(len(opacity) + 1)]
    sizes = [tuple(tensors[f"layers.{i}.colors"].shape[:2]) for i in range(len(affines))]
    names = sorted(n for n in tensors if n.startswith("layers.0.bends."))
    bends = tuple(tensors[n].shape[1] for n in names)
    model = LayeredAtlas(affines, sizes, opacity, bends)
    model.load_state_dict(dict(tensors))
    return model.requires_grad_(False)


def pictures(model: LayeredAtlas) -> dict[str, np.ndarray]:
    """Each layer by name: uint8 [H, W, 3], a foreground [H, W, 4] with its opacity there."""
    found = {}
    for i, (name, layer) in enumerate(zip(model.names, model.layers, strict=True)):
        picture = layer.colors.detach().clamp(0, 1)
        if name != "background":
            picture = torch.cat([picture, _cover(model, i)[..., None]], 2)
        found[name] = picture.mul(255).round().byte().cpu().numpy()
    return found


def read_picture(
    path: str | os.PathLike, model: LayeredAtlas, layer: str | None = None
) -> tuple[int, Tensor]:
    """An edited picture of a layer, and the layer's number.

    Args:
        path: a PNG as `save_atlas` wrote it, edited. Where its alpha is less than before, less of
            the layer is left.
        model: the atlas it belongs to.
        layer: its name; None takes what the PNG itself says, else what its name begins with.
    Returns:
        Number of the layer, and its picture [H, W, 3 or 4] in [0, 1], as `render` takes it.
    Raises:
        AtlasError: no picture, an unknown layer, or another size.
    """
    path, image = Path(path), need("PIL.Image")
    try:
        with image.open(path) as picture:
            said = layer or picture.info.get(LAYER) or _by_name(path.stem, model.names)
            pixels = np.asarray(picture.convert("RGBA"))
    except OSError as error:
        reason = "it does not exist" if not path.exists() else "it is no picture"
        raise AtlasError(f"cannot read the atlas {path}: {reason}") from error
    if said not in model.names:
        names = ", ".join(model.names)
        told = f"{said!r} is no layer" if said else f"cannot tell which layer {path} is"
        raise AtlasError(f"{told}: use --atlas-layer with one of {names}")
    index = model.names.index(said)
    height, width = model.layers[index].size
    if pixels.shape[:2] != (height, width):
        raise AtlasError(
            f"{path} is {pixels.shape[1]} x {pixels.shape[0]} pixels, the {said} atlas "
            f"{width} x {height}: save it at its own size"
        )
    colors = torch.from_numpy(pixels.copy()).float() / 255
    if said == "background":
        return index, colors[..., :3]
    before = (_cover(model, index) * 255).round() / 255
    left = torch.where(before > 0, (colors[..., 3] / before.clamp(min=1 / 255)).clamp(max=1), 1)
    return index, torch.cat([colors[..., :3], left[..., None]], 2)


def digest(frames: np.ndarray) -> str:
    """What tells one clip's frames, uint8 [F, H, W, 3], from another's."""
    return hashlib.sha256(np.ascontiguousarray(frames)).hexdigest()[:32]


def _by_name(stem: str, names: list[str]) -> str | None:
    return next((n for n in sorted(names, key=len, reverse=True) if stem.startswith(n)), None)


@torch.no_grad()
def _cover(model: LayeredAtlas, i: int) -> Tensor:
    """Mean opacity [H, W] of the pixels that show each texel of a foreground."""
    uv = model.uv_maps(i).reshape(1, -1, 2)
    alpha = model.alphas()[i].reshape(1, -1, 1)
    return atlas_splat(alpha, uv, model.layers[i].size)[0][0, ..., 0]
