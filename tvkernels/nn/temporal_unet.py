"""TCVE's temporal U-Net and the units that join it to the spatial one (section IV-B).

As the released code has it (resnet.py, unet.py, unet_blocks.py), where the paper leaves it open:

- The temporal U-Net mirrors the spatial one (its channels, its ResNets per level, its skips), with
  one 1-D convolution over frames in a ResNet, no time embedding, no text, and never another size
  over space.
- A unit's attention has a residual and starts at none; its 3-D convolution starts at zero and is
  added to the spatial features alone, so that a unit is the identity at the start.

And what was decided otherwise:

- The code needs a multiple of 8 frames. Here halving rounds up, and upsampling returns to the
  length of the skip that follows.
- The code also builds units for the down blocks and never calls them: dead weights, which its
  optimizer still carries. They are left out.
- After its up blocks the code reshapes the temporal volume, which stays at the latents' size, by
  the height that the spatial branch has there: at height 16 of 64 it reads 64 x 64 as 16 x 256, so
  a position is joined to what happened elsewhere. Mended: positions stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvkernels.nn.temporal import TemporalAttention
from tvkernels.ops.clip_group_norm.api import clip_group_norm
from tvkernels.ops.temporal_conv.api import temporal_conv
from tvkernels.processors.clip import Clip
from tvkernels.processors.touched import is_plain

GROUPS = 8  # of a unit's norm, as published


def convolve(
    conv: nn.Conv1d, x: Tensor, norm: nn.GroupNorm | None = None,
    residual: Tensor | None = None, frames: int | None = None,
) -> Tensor:  # fmt: skip
    """`temporal_conv` with a layer's weights and those of a norm before it; autocast counts."""
    if not (is_plain(conv, nn.Conv1d) and (norm is None or is_plain(norm, nn.GroupNorm))):
        return _called(conv, x, norm, residual, frames)
    tensors = {"x": x, "weight": conv.weight, "bias": conv.bias, "residual": residual}
    options = {"stride": conv.stride[0], "frames": frames}
    if norm is not None:
        tensors |= {"norm_weight": norm.weight, "norm_bias": norm.bias}
        options |= {"groups": norm.num_groups, "eps": norm.eps}
    if torch.is_autocast_enabled(x.device.type):
        narrow = torch.get_autocast_dtype(x.device.type)
        tensors = {name: t if t is None else t.to(narrow) for name, t in tensors.items()}
    return temporal_conv(**tensors, **options)


def _called(conv, x, norm, residual, frames):
    """`convolve` of layers that work only when they are called: with adapters or hooks."""
    b, f, _, h, w = x.shape
    y = x.permute(0, 3, 4, 2, 1).flatten(0, 2)
    y = y if norm is None else F.silu(norm(y))
    if frames not in (None, f):
        y = y[..., nearest(frames, f, x.device)]
    y = conv(y).unflatten(0, (b, h, w)).permute(0, 4, 3, 1, 2)
    return y if residual is None else y + residual


class TemporalResnet(nn.Module):
    """Group norm, SiLU, a 1-D convolution over frames, and a residual.

    Args:
        channels, out: of what comes and what goes.
        groups: of the norm.
    """

    def __init__(self, channels: int, out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = nn.Conv1d(channels, out, 3, padding=1)
        self.conv_shortcut = nn.Conv1d(channels, out, 1) if channels != out else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """[B, F, C, h, w], with a skip's channels behind its own -> [B, F, out, h, w]."""
        x = x if skip is None else torch.cat([x, skip], 2)
        shortcut = x if self.conv_shortcut is None else convolve(self.conv_shortcut, x)
        return convolve(self.conv1, x, self.norm1, residual=shortcut)


class TemporalLevel(nn.Module):
    """ResNets, and the convolution that halves the frames or follows their return.

    Args:
        channels: of what each ResNet takes, skips included.
        out: channels of the level.
        groups: of the norms.
        down, up: which of the two convolutions there is.
    """

    def __init__(self, channels: Sequence[int], out: int, groups: int, *, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList([TemporalResnet(c, out, groups) for c in channels])
        for name, exists in (("downsamplers", down), ("upsamplers", up)):
            if exists:
                layer = nn.Module()
                layer.conv = nn.Conv1d(out, out, 3, 2 if down else 1, padding=1)
                setattr(self, name, nn.ModuleList([layer]))


class SpatialTemporalUnit(nn.Module):
    """X_spa + SiLU(Conv3d(GroupNorm(X_fuse))), X_fuse = X_spa + weight X_att (eq. 7).

    X_att = X_tem + Attention(LayerNorm(X_tem)), over the frames of each position.

    Args:
        channels, heads: of both branches and of the attention.
        weight: lambda.
        attention: without it X_att is X_tem (table III).
        convolution: without it X_fuse is the result (table III).
    """

    def __init__(
        self, channels: int, heads: int, weight: float = 0.1, *, attention=True, convolution=True
    ):
        super().__init__()
        self.weight = weight
        self.attn_temp = TemporalAttention(channels, heads) if attention else None
        self.norm = self.conv = None
        if convolution:
            self.norm = nn.GroupNorm(GROUPS, channels)
            self.conv = nn.Conv3d(channels, channels, 3, padding=1)
            nn.init.zeros_(self.conv.weight)
            nn.init.zeros_(self.conv.bias)

    def forward(self, spatial: Tensor, temporal: Tensor) -> Tensor:
        """[B, F, C, h, w] and [B or 1, F', C, h, w], any F' -> [B, F, C, h, w]."""
        frames = spatial.shape[1]
        if frames % temporal.shape[1]:
            temporal = temporal[:, nearest(frames, temporal.shape[1], spatial.device)]
        if self.attn_temp is not None:
            # Before frames stand for others: where each stands for as many, softmax over all of
            # them is softmax over the real ones.
            attended = self.attn_temp(temporal.flatten(3).transpose(2, 3))
            temporal = attended.transpose(2, 3).unflatten(3, temporal.shape[3:])
        x = fuse(spatial, temporal, self.weight)
        if self.conv is None:
            return x
        norm = self.norm
        if is_plain(norm, nn.GroupNorm):
            x = x.to(norm.weight.dtype)  # another one under autocast alone
            x = clip_group_norm(x, norm.weight, norm.bias, norm.num_groups, eps=norm.eps)
        else:
            x = norm(x.transpose(1, 2)).transpose(1, 2)
        return spatial + F.silu(self.conv(x.transpose(1, 2))).transpose(1, 2)


class Sum(nn.Module):
    """X_spa + X_tem, in place of a unit (table II)."""

    def forward(self, spatial: Tensor, temporal: Tensor) -> Tensor:
        """[B, F, C, h, w] and [B or 1, F', C, h, w], any F' -> [B, F, C, h, w]."""
        frames = spatial.shape[1]
        if frames % temporal.shape[1]:
            temporal = temporal[:, nearest(frames, temporal.shape[1], spatial.device)]
        return fuse(spatial, temporal, 1.0)


def nearest(length: int, real: int, device) -> Tensor:
    """Which of `real` places each of `length` takes under a nearest resize, as an index."""
    return torch.arange(length, device=device) * real // length


def fuse(spatial: Tensor, temporal: Tensor, weight: float) -> Tensor:
    """spatial + weight * temporal, whose clip and frames stand for as many of the other's each."""
    real = temporal.shape[1]
    parts = spatial.unflatten(1, (real, spatial.shape[1] // real))
    return torch.add(parts, temporal[:, :, None], alpha=weight).flatten(1, 2)


class TemporalUNet(nn.Module):
    """The temporal U-Net, and the units at the spatial one's middle and after its up blocks.

    Args:
        in_channels: of the latents.
        channels: of each level, as the spatial U-Net's.
        layers: ResNets per level going down; one more going up.
        groups: of the ResNets' norms.
        heads, weight, attention, convolution: of the units, see there.
        branch: without it there are units alone, which read the spatial volume (table II).
        unit: without them the branch is added as it is (table II).
        middle: whether the spatial U-Net has a middle block, and so a unit there.
    """

    gradient_checkpointing = False

    def __init__(
        self, in_channels: int, channels: Sequence[int], layers: int, groups: int, heads: int, *,
        weight: float = 0.1, branch: bool = True, unit: bool = True, attention: bool = True,
        convolution: bool = True, middle: bool = True,
    ):  # fmt: skip
        super().__init__()
        top = len(channels) - 1
        self.branch = branch

        def join(dim: int) -> nn.Module:
            if not unit:
                return Sum()
            return SpatialTemporalUnit(
                dim, heads, weight, attention=attention, convolution=convolution
            )

        self.mid_stb = join(channels[-1]) if middle else None
        self.up_stb = nn.ModuleList([join(c) for c in reversed(channels)])
        if not branch:
            return
        self.conv_in = nn.Conv1d(in_channels, channels[0], 7, padding=3)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips = [c := channels[0]]
        for i, out in enumerate(channels):
            sizes = [c, *[out] * (layers - 1)]
            self.down_blocks.append(TemporalLevel(sizes, out, groups, down=i < top))
            skips += [c := out] * (layers + (i < top))
        self.mid_block = TemporalLevel([c, c], c, groups)
        for i, out in enumerate(reversed(channels)):
            sizes = [c + skips.pop(), *(out + skips.pop() for _ in range(layers))]
            self.up_blocks.append(TemporalLevel(sizes, c := out, groups, up=i < top))

    def forward(self, sample: Tensor) -> list[Tensor]:
        """[B, F, 4, h, w] -> what each unit reads, middle first, at the spatial branch's sizes.

        Frames are those of the temporal level: [B, F', C, h', w'].
        """
        sizes = [sample.shape[3:]]
        for _ in self.down_blocks[1:]:
            sizes.append([(n - 1) // 2 + 1 for n in sizes[-1]])
        x = convolve(self.conv_in, sample)
        skips = [x]
        for level in self.down_blocks:
            for resnet in level.resnets:
                skips.append(x := self.run(resnet, x))
            if hasattr(level, "downsamplers"):
                skips.append(x := convolve(level.downsamplers[0].conv, x))
        for resnet in self.mid_block.resnets:
            x = self.run(resnet, x)
        found = [] if self.mid_stb is None else [_shrink(x, sizes[-1], len(sizes) > 1)]
        for level in self.up_blocks:
            for resnet in level.resnets:
                x = self.run(resnet, x, skips.pop())
            if hasattr(level, "upsamplers"):
                sizes.pop()
                x = convolve(level.upsamplers[0].conv, x, frames=skips[-1].shape[1])
            found.append(_shrink(x, sizes[-1], len(sizes) > 1))
        return found

    def run(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        """A module on them, checkpointed where diffusers has switched that on."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(module, *inputs)
        return module(*inputs)


def _shrink(x: Tensor, size: Sequence[int], smaller: bool) -> Tensor:
    """The places of [..., h, w] that a nearest resize to `size` reads, and no others."""
    if not smaller:
        return x
    rows, columns = (nearest(n, real, x.device) for n, real in zip(size, x.shape[3:], strict=True))
    return x[..., rows[:, None], columns]


@dataclass
class Joint:
    """What the hooks on a spatial U-Net hand on during one call of it.

    Args:
        clip: frames of the call under way.
        net: the temporal branch and its units.
        sample: the latents, from the first convolution on.
        features: what the units still to come read.
    """

    clip: Clip
    net: TemporalUNet
    sample: Tensor | None = None
    features: list[Tensor] = field(default_factory=list)

    def begin(self, module: nn.Module, args: tuple, out: Tensor) -> None:
        """After the first convolution: what it was given."""
        self.sample = args[0]

    def join(self, unit: nn.Module, module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        """After a block: its result with the temporal branch's.

        The first of them runs the branch, so that nothing of it is held while the spatial U-Net
        goes down.
        """
        spatial = self.clip.split(out)
        temporal = spatial
        if self.net.branch:
            if self.sample is not None:
                sample, self.sample = self.clip.split(self.sample), None
                # It reads no text: guidance's halves have the same features.
                self.features = self.net(sample[:1] if self.clip.one_clip else sample)
            temporal, *self.features = self.features
        return self.net.run(unit, spatial, temporal).flatten(0, 1)
