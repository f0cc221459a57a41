"""A method's video UNet as data: which frames are read, what is added, what is tuned."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvkernels.patterns import FramePattern


@dataclass(frozen=True)
class TemporalModule:
    """Attention over frames, added after the feed-forward of every transformer block.

    Args:
        norm: what precedes it: "layer_norm", "layer_norm_plain" (no learnable weights), "none",
            "instance_norm" (over frames, with rescaling) or "centering" (EI2, eq. 6).
        spectral: W_v and W_L divided by their largest singular value (EI2, eq. 8).
        start: "zero_weight" (the output's weight zero, its bias as torch draws it: Tune-A-Video)
            or "zero_bias" (weight as torch draws it, bias zero: EI2, eq. 9).
    """

    norm: str = "layer_norm"
    spectral: bool = False
    start: str = "zero_weight"


@dataclass(frozen=True)
class TemporalUnet:
    """A U-Net over frames beside the spatial one, and the units that join both (TCVE, IV-B).

    Args:
        weight: lambda, of what a unit adds to the spatial features.
        branch: without it there are units alone, whose attention reads the spatial features.
        unit: without them the branch's features are added as they are.
        attention, convolution: whether units have either.
    """

    weight: float = 0.1
    branch: bool = True
    unit: bool = True
    attention: bool = True
    convolution: bool = True


@dataclass(frozen=True)
class Recipe:
    """How a 2-D UNet becomes a method's video UNet; `tvkernels.inflate` carries it out.

    Args:
        name: the method's name.
        source: paper and, where public code decided a trap, the code.
        pattern: frames that self-attention reads, for all layers or ((prefix, pattern), ...).
        temporal: the module over frames, or None.
        clip_group_norm: the ResNets' group norms and the last one pool statistics over frames.
        temporal_unet: the U-Net over frames beside this one, or None.
        tuned: parts of parameter names that tuning reaches; everything else is frozen.
    """

    name: str
    source: str
    pattern: FramePattern | tuple[tuple[str, FramePattern], ...]
    temporal: TemporalModule | None = None
    clip_group_norm: bool = False
    temporal_unet: TemporalUnet | None = None
    tuned: tuple[str, ...] = ()


# The plain 2-D UNet: every frame an image of its own.
FRAME_BY_FRAME = Recipe("frame-by-frame", "Stable Diffusion", FramePattern.own())

# Parity decided on purpose, as the public code has it: group norms of the 5-D ResNets pool over
# frames; attn_temp.to_out starts with a zero weight but a random bias, so the inflated UNet is not
# an exact identity at the start; attn_temp has neither positions nor mask. Tuned otherwise: the
# norm before attn_temp, new as the rest of it, which the script's list of names leaves frozen.
TUNE_A_VIDEO = Recipe(
    "tune-a-video",
    "Tune-A-Video, ICCV 2023; github.com/showlab/Tune-A-Video attention.py, resnet.py",
    FramePattern.first_previous(),
    TemporalModule(),
    clip_group_norm=True,
    tuned=("attn1.to_q", "attn2.to_q", "attn_temp"),
)

# The paper names no pooling operator (ours: average), leaves r at 2 or 4 (ours: 2) and does not
# name a place for STAM (ours: attn_temp's) or a norm for the ResNets (ours: its baseline's). W_L
# starts random: a zero start has no spectral norm to divide by, so STAM is not the identity at the
# start.
EI2 = Recipe(
    "ei2",
    "EI2, NeurIPS 2023, eq. 6, 8, 9, 10",
    FramePattern.fine_coarse(2),
    TemporalModule(norm="centering", spectral=True, start="zero_bias"),
    clip_group_norm=True,
    tuned=("attn1.to_q", "attn2.to_q", "attn_temp"),
)

# As published: its code is Tune-A-Video's with the temporal U-Net beside it, and tunes W_q and
# attn_temp too, where the paper freezes a plain 2-D UNet.
TCVE = replace(
    TUNE_A_VIDEO,
    name="tcve",
    source="TCVE, arXiv 2308.09091; github.com/mdswyz/TCVE unet.py, unet_blocks.py",
    temporal_unet=TemporalUnet(),
    tuned=(*TUNE_A_VIDEO.tuned, "temporal_unet"),
)
TCVE_PAPER = replace(
    TCVE,
    name="tcve-paper",
    pattern=FramePattern.own(),
    temporal=None,
    clip_group_norm=False,
    tuned=("temporal_unet",),
)

# Equation 6 alone: nothing is added and nothing tuned, so that what the norms of ResNets pool is
# not the paper's to say; each frame keeps its own, as the pretrained weights know them.
BLENDED_DIFFUSION = Recipe(
    "blended-diffusion",
    "Blended latent diffusion under attention control, arXiv 2409.03514, eq. 6",
    FramePattern.previous_own(),
)


def _variant(base: Recipe, name: str, norm: str) -> Recipe:
    return replace(base, name=name, temporal=replace(base.temporal, norm=norm))


def _without(name: str, **parts: bool) -> Recipe:
    return replace(TCVE, name=f"tcve-no-{name}", temporal_unet=TemporalUnet(**parts))


# EI2's figure 4 changes Tune-A-Video's temporal module alone, figure 5 EI2's pattern alone.
# The methods themselves are the other ends: the learnable layer norm, and ratio 2.
# Sparse-causal EI2 is also figure 4's last step, Tune-A-Video with centering and spectral norms.
# The frame norms are not the papers': both take the clip-wide ones over from public code, and
# these say what that costs a model which was trained on single pictures.
# TCVE's tables II (no temporal U-Net, no unit) and III (a unit without either part) change the
# published form; its other form is the paper's.
ABLATIONS = {
    recipe.name: recipe
    for recipe in (
        _variant(TUNE_A_VIDEO, "tav-layer-norm-plain", "layer_norm_plain"),
        _variant(TUNE_A_VIDEO, "tav-no-norm", "none"),
        _variant(TUNE_A_VIDEO, "tav-instance-norm", "instance_norm"),
        _variant(TUNE_A_VIDEO, "tav-centering", "centering"),
        replace(EI2, name="ei2-sparse-causal", pattern=FramePattern.first_previous()),
        replace(EI2, name="ei2-r4", pattern=FramePattern.fine_coarse(4)),
        replace(TUNE_A_VIDEO, name="tav-frame-norm", clip_group_norm=False),
        replace(EI2, name="ei2-frame-norm", clip_group_norm=False),
        TCVE_PAPER,
        _without("temporal-unet", branch=False),
        _without("unit", unit=False),
        _without("attention", attention=False),
        _without("3d-convolution", convolution=False),
    )
}

RECIPES = {
    recipe.name: recipe for recipe in (FRAME_BY_FRAME, TUNE_A_VIDEO, EI2, TCVE, BLENDED_DIFFUSION)
}
