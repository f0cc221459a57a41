"""What lies in files of weights, told from their first bytes: nothing is unpickled or loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
UNET = "model.diffusion_model."
# Parts of a checkpoint in Stable Diffusion's own layout, by the names of their tensors.
PARTS = {"UNet": UNET, "VAE": "first_stage_model.", "text encoder": "cond_stage_model."}
CONV_IN = f"{UNET}input_blocks.0.0.weight"
TEXT_IN = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
# How to reach the weights in a pickle of each kind: part of the line that converts it.
INSIDE = {
    "checkpoint": "s = s.get('state_dict', s)",
    "LoRA": "s = s.get('state_dict', s)",
    "embedding": "s = {'emb_params': s['string_to_param']['*']} if 'string_to_param' in s else s",
}


class ModelError(ValueError):
    """The model is not one these pipelines can run; one line that says what to do."""


def read_shapes(path: str | Path, kind: str = "checkpoint") -> dict[str, tuple[int, ...]]:
    """The tensors of a .safetensors file, name -> shape, from its header.

    Args:
        path: the file.
        kind: a key of `INSIDE`, which the errors name.
    Raises:
        ModelError: no such file, a pickle (also under another name), or not whole.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path} is not there: give the {kind}'s .safetensors file")
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        whole = len(start) == 8 and length < path.stat().st_size
        header = file.read(length) if whole else b""
    if header[:1] != b"{":
        if path.suffix.lower() in PICKLES or start[:2] in (b"PK", b"\x80\x02", b"\x80\x04"):
            raise ModelError(
                f"{path} is a pickle, which can run any code when it is opened: convert it by "
                f"{_conversion(path, kind)}"
            )
        raise ModelError(f"{path} is no whole .safetensors file: get or save it again")
    try:
        found = json.loads(header)
        ends = [d["data_offsets"][1] for name, d in found.items() if name != "__metadata__"]
        if 8 + length + max(ends, default=0) != path.stat().st_size:
            raise ValueError("cut off")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{path} is no whole .safetensors file: get or save it again") from None
    return {name: tuple(d["shape"]) for name, d in found.items() if name != "__metadata__"}


def _conversion(path: Path, kind: str) -> str:
    new = path.with_suffix(".safetensors")
    new = new if new != path else path.with_name(f"{path.stem}-converted.safetensors")
    code = (
        "import torch; from safetensors.torch import save_file; s = torch.load("
        f"open({str(path)!r}, 'rb'), map_location='cpu', weights_only=True); {INSIDE[kind]}; "
        "save_file({k: v.detach().clone().contiguous() for k, v in s.items() "
        f"if hasattr(v, 'detach')}}, {str(new)!r})"
    )
    return f'python -c "{code}"'


def check_lora(path: str | Path) -> Path:
    """A LoRA's file, in diffusers', PEFT's or Kohya's layout; of a folder, diffusers' own in it.

    Raises:
        ModelError: no such file, a pickle, or no LoRA.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "pytorch_lora_weights.safetensors"
    if not any("lora" in name or "hada" in name for name in read_shapes(path, "LoRA")):
        raise ModelError(f"{path} holds no LoRA: give a file of LoRA weights for SD-1.x")
    return path


def check_embedding(path: str | Path) -> str:
    """The word that calls a textual inversion in a prompt, from its file.

    That is the name of its tensor, or of the file where others than diffusers have made it.

    Raises:
        ModelError: no such file, a pickle, or no embedding of one text encoder.
    """
    shapes = read_shapes(path, "embedding")
    if len(shapes) != 1 or len(next(iter(shapes.values()))) not in (1, 2):
        raise ModelError(f"{path} holds no textual inversion of SD-1.x: one tensor of [N, C]")
    (name,) = shapes
    return Path(path).stem if name == "emb_params" else name


def single_file_kind(path: str | Path, configs: Mapping[Path, tuple[int, int]]) -> Path:
    """The configuration of a checkpoint in one file, by its tensors' shapes.

    Args:
        path: a .safetensors file in Stable Diffusion's own layout.
        configs: folder in diffusers' layout -> (channels of the first block, of the text).
    Raises:
        ModelError: a pickle, no whole model, or one of another family.
    """
    shapes = read_shapes(path)
    names = [
        part for part, prefix in PARTS.items() if not any(n.startswith(prefix) for n in shapes)
    ]
    if "UNet" in names:
        kind = "a LoRA: give it beside a model" if any("lora" in n for n in shapes) else (
            "no whole Stable Diffusion 1.x checkpoint: give one, or a folder in diffusers' layout"
        )  # fmt: skip
        raise ModelError(f"{path} is {kind}")
    if any(name.startswith("conditioner.") for name in shapes):
        raise ModelError(f"{path} is an SDXL model: give a Stable Diffusion 1.x model")
    if len(shapes.get(CONV_IN, ())) != 4:
        raise ModelError(f"{path} is a model of another family: give a Stable Diffusion 1.x model")
    (first, channels, *_), text = shapes[CONV_IN], shapes.get(TEXT_IN, (0, 0))[1]
    if channels != 4:
        raise ModelError(
            f"{path}: the UNet takes {channels} channels (an inpainting or depth model): "
            "give a plain Stable Diffusion 1.x model"
        )
    if names:
        raise ModelError(f"{path} has no {' and no '.join(names)}: give a whole checkpoint")
    for folder, known in configs.items():
        if known == (first, text):
            return folder
    raise ModelError(
        f"{path}: a UNet of {first} channels under a text of {text} is no Stable Diffusion 1.x "
        "model: give one, or load it by from_single_file(path, config=FOLDER) of configurations"
    )
