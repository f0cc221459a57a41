"""Small UNets of Stable Diffusion 1.x's block types with random weights, and inputs for them."""

import logging

import torch

SD_BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
SD15 = {
    **SD_BLOCKS,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
}
TINY = {
    **SD_BLOCKS,
    "sample_size": 8,
    "block_out_channels": (32, 64, 64, 64),
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}
MOTION = {
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "cross_attention_dim": 32,
    "num_attention_heads": 4,
    "motion_num_attention_heads": 4,
}
VIDEO = {
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
}


def build(name: str, config: dict, seed: int = 0):
    """A diffusers model in evaluation mode; zero-initialised layers get random weights too."""
    import diffusers

    torch.manual_seed(seed)
    model = getattr(diffusers, name)(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


def tiny_unet(seed: int = 0, **changes):
    """A UNet2DConditionModel of four levels."""
    return build("UNet2DConditionModel", {**TINY, **changes}, seed)


def drawn(model, layers: int):
    """A published UNet of `TINY`'s sizes, random where the methods start at one and zero."""
    torch.manual_seed(5)
    made = model(
        TINY["block_out_channels"], layers, TINY["attention_head_dim"],
        TINY["cross_attention_dim"], TINY["norm_num_groups"],
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter.normal_(float(name.endswith("weight")), 0.3)
    return made


def one_level_unet():
    """The smallest UNet with self-attention and text, for what takes long, such as compiling."""
    return tiny_unet(
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(32,), mid_block_type=None,
    )  # fmt: skip


def clip_inputs(batch: int = 2, frames: int = 3, size=(8, 8), seed: int = 1, tokens: int = 5):
    """(sample [B * F, 4, h, w], timestep, text [B, L, 32])."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(batch * frames, 4, *size, generator=generator)
    text = torch.randn(batch, tokens, 32, generator=generator)
    return sample, torch.tensor(301), text


def assert_rounding(actual, expected, factor: float = 64.0):
    """Equal but for float32 rounding through a whole network: a few ulp of the largest value."""
    assert actual.shape == expected.shape
    step = torch.finfo(expected.dtype).eps * expected.abs().max().item()
    error = (actual - expected).abs().max().item()
    assert error <= factor * step, f"differs by {error / step:.0f} rounding steps"


def seeded(seed=0):
    """A generator of that seed."""
    return torch.Generator().manual_seed(seed)


def run_clip(unet, sample, t, text, frames=3):
    """An inflated UNet's output: text is given once per clip."""
    return unet(sample, t, text, cross_attention_kwargs={"num_frames": frames}).sample


def look(unet, *inputs):
    """`run_clip` without gradients."""
    with torch.no_grad():
        return run_clip(unet, *inputs)


def loss_of(unet, sample, t, text):
    """Mean squared distance from a fixed random target."""
    target = torch.randn(sample.shape, generator=seeded(9))
    return (run_clip(unet, sample, t, text) - target).square().mean()


def run_installed(unet, sample, t, text, frames=3, **kwargs):
    """The UNet's output with text repeated per frame, as `install` leaves it."""
    if frames is not None:
        kwargs["cross_attention_kwargs"] = {"num_frames": frames}
    text = text.repeat_interleave(sample.shape[0] // text.shape[0], 0)
    with torch.no_grad():
        return unet(sample, t, text, **kwargs).sample


class LogLines:
    """What diffusers logs while it is entered."""

    def __enter__(self):
        import diffusers

        self.lines, self.logger = [], logging.getLogger("diffusers")
        self.handler = logging.Handler()
        self.handler.emit = lambda record: self.lines.append(record.getMessage())
        self.level = diffusers.utils.logging.get_verbosity()
        diffusers.utils.logging.set_verbosity_warning()
        self.logger.addHandler(self.handler)
        return self.lines

    def __exit__(self, *error):
        import diffusers

        self.logger.removeHandler(self.handler)
        diffusers.utils.logging.set_verbosity(self.level)
