"""Files as users have them: checkpoints in Stable Diffusion's own layout, LoRAs, embeddings."""

import re

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
VAE = {
    "conv_norm_out": "norm_out", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
    "to_out.0": "proj_out", "conv_shortcut": "nin_shortcut",
}  # fmt: skip


def _renamed(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        name = re.sub(rf"(^|\.){re.escape(old)}\.", rf"\g<1>{new}.", name)
    return name


def unet_name(name: str, layers: int) -> str:
    """A UNet's name in Stable Diffusion's layout, by diffusers' own."""
    side, *rest = name.split(".")
    if side == "mid_block":
        part = int(rest[0] == "attentions")
        inner = _renamed(".".join(rest[2:]), {} if part else RESNET)
        return f"middle_block.{2 * int(rest[1]) + part}.{inner}"
    if side not in ("down_blocks", "up_blocks"):
        return _renamed(name, UNET)
    block, kind, number, *rest = rest
    first, part = int(block) * (layers + 1), int(kind == "attentions")
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op.{rest[-1]}"
    if kind == "upsamplers":  # behind the attention, where there is one
        return f"output_blocks.{first + layers}.{1 if block == '0' else 2}.conv.{rest[-1]}"
    where = f"input_blocks.{first + int(number) + 1}"
    if side == "up_blocks":
        where = f"output_blocks.{first + int(number)}"
    return f"{where}.{part}." + _renamed(".".join(rest), {} if part else RESNET)


def vae_name(name: str, levels: int) -> str:
    """A VAE's name in that layout."""
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    for kind, theirs in (("resnets", "block"), ("upsamplers.0", "upsample")):
        name = re.sub(
            rf"up_blocks\.(\d+)\.{kind}\.",
            lambda found, theirs=theirs: f"up.{levels - 1 - int(found[1])}.{theirs}.", name,
        )  # fmt: skip
    name = re.sub(r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", name)
    return _renamed(name.replace("mid_block.attentions.0.", "mid.attn_1."), VAE)


def checkpoint(folder) -> dict[str, torch.Tensor]:
    """A model in diffusers' layout as a state dict in Stable Diffusion's."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    layers, levels = pipe.unet.config.layers_per_block, len(pipe.vae.config.block_out_channels)
    found = {
        f"model.diffusion_model.{unet_name(name, layers)}": tensor
        for name, tensor in pipe.unet.state_dict().items()
    }
    for name, tensor in pipe.vae.state_dict().items():
        if re.search(r"attentions.*to_.*weight", name):
            tensor = tensor[..., None, None]  # their attention's layers are convolutions
        found[f"first_stage_model.{vae_name(name, levels)}"] = tensor
    for name, tensor in pipe.text_encoder.state_dict().items():
        name = "text_model." + name.removeprefix("text_model.")
        found[f"cond_stage_model.transformer.{name}"] = tensor
    return {name: tensor.contiguous() for name, tensor in found.items()}


def save_checkpoint(folder, path, dtype=torch.float32):
    """Writes it as one .safetensors file; gives the path back."""
    save_file({name: tensor.to(dtype) for name, tensor in checkpoint(folder).items()}, path)
    return path


def lora(unet, text_encoder=None, rank: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random LoRA weights in diffusers' layout, of all attention layers of plain models."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    ends = {"unet": ("to_q", "to_k", "to_v", "to_out.0"), "text_encoder": ("q_proj", "out_proj")}
    for part, model in (("unet", unet), ("text_encoder", text_encoder)):
        for name, layer in model.named_modules() if model is not None else ():
            if name.endswith(ends[part]):
                if part == "text_encoder":  # as they are called whatever transformers' version
                    name = "text_model." + name.removeprefix("text_model.")
                for kind, shape in (("A", (rank, layer.in_features)),
                                    ("B", (layer.out_features, rank))):  # fmt: skip
                    tensor = torch.randn(shape, generator=generator) * 0.2
                    found[f"{part}.{name}.lora_{kind}.weight"] = tensor
    return found


def kohya(weights: dict[str, torch.Tensor], alpha: float = 1.0) -> dict[str, torch.Tensor]:
    """The same weights under the names of Kohya's scripts."""
    prefixes, found = {"unet": "lora_unet", "text_encoder": "lora_te"}, {}
    for name, tensor in weights.items():
        part, _, rest = name.partition(".")
        layer, kind = re.fullmatch(r"(.*)\.lora_(A|B)\.weight", rest).groups()
        stem = f"{prefixes[part]}_{layer.replace('.', '_')}"
        found[f"{stem}.lora_{'down' if kind == 'A' else 'up'}.weight"] = tensor
        found[f"{stem}.alpha"] = torch.tensor(alpha)
    return found
