"""TCVE: Tune-A-Video's UNet with a temporal U-Net beside it on (b h w) c f, joined in volumes.

Parameters are named as published, the part after `_TempUnet` as the spatial U-Net's. Two things
differ from the published code, as in ours: any number of frames, where it needs a multiple of
eight, and positions that stay where they are, where it reads the volume by another height.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvkernels.benchmarks.reference import tune_a_video
from tvkernels.benchmarks.reference.attention import Attention

WEIGHT = 0.1


class TemporalResNet(nn.Module):
    """Two convolutions over frames; the norms see one position."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, c_in), nn.GroupNorm(groups, c_out)
        self.conv1, self.conv2 = (nn.Conv1d(c, c_out, 3, padding=1) for c in (c_in, c_out))
        self.conv_shortcut = nn.Conv1d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        """[b * h * w, c_in, f] -> [b * h * w, c_out, f]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Resize(nn.Module):
    """A convolution over frames, of stride 2 or after their return."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, stride=stride, padding=1)


class Level(nn.Module):
    """ResNets and a change of the number of frames."""

    def __init__(self, channels, c_out: int, groups: int, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList([TemporalResNet(c, c_out, groups) for c in channels])
        if down:
            self.downsamplers = nn.ModuleList([Resize(c_out, 2)])
        if up:
            self.upsamplers = nn.ModuleList([Resize(c_out, 1)])


class Unit(nn.Module):
    """X_spa + 0.1 Attention(LayerNorm(X_tem)), then a 3-D convolution with residual (eq. 7)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attn_temp, self.norm_temp = Attention(dim, heads), nn.LayerNorm(dim)
        self.norm, self.conv = nn.GroupNorm(8, dim), nn.Conv3d(dim, dim, 3, padding=1)

    def forward(self, x_spa: Tensor, x_tem: Tensor, without=()) -> Tensor:
        """Both [b, c, f, h, w], the temporal volume of any size."""
        b, c, f, h, w = x_spa.shape
        x_tem = F.interpolate(x_tem, (f, h, w), mode="nearest")
        if "attention" not in without:
            tokens = x_tem.permute(0, 3, 4, 2, 1).reshape(b * h * w, f, c)
            tokens = self.attn_temp(self.norm_temp(tokens))
            x_tem = tokens.reshape(b, h, w, f, c).permute(0, 4, 3, 1, 2)
        x = x_spa + WEIGHT * x_tem
        return x if "convolution" in without else x + F.silu(self.conv(self.norm(x)))


class VideoUNet(tune_a_video.VideoUNet):
    """Tune-A-Video's, and the temporal U-Net.

    Attributes:
        without: what the ablations leave out, of "temporal-unet", "unit", "attention" and
            "convolution".
    """

    without: tuple[str, ...] = ()

    def __init__(self, channels, layers: int, heads: int, context: int, groups: int, how="math"):
        super().__init__(channels, layers, heads, context, groups, how)
        top = len(channels) - 1
        self.conv_in_TempUnet = nn.Conv1d(4, channels[0], 7, padding=3)
        self.down_blocks_TempUnet, self.up_blocks_TempUnet = nn.ModuleList(), nn.ModuleList()
        skips, c = [channels[0]], channels[0]
        for i, c_out in enumerate(channels):
            sizes = [c] + [c_out] * (layers - 1)
            self.down_blocks_TempUnet.append(Level(sizes, c_out, groups, down=i < top))
            skips += [c_out] * (layers + (i < top))
            c = c_out
        self.mid_block_TempUnet = Level([c, c], c, groups)
        for i, c_out in enumerate(reversed(channels)):
            sizes = []
            for _ in range(layers + 1):
                sizes.append(c + skips.pop())
                c = c_out
            self.up_blocks_TempUnet.append(Level(sizes, c_out, groups, up=i < top))
        self.mid_stb_TempUnet = Unit(channels[-1], heads)
        self.up_stb_TempUnet = nn.ModuleList([Unit(c, heads) for c in reversed(channels)])
        # Built and never called in the published code too.
        self.down_stb_TempUnet = nn.ModuleList([Unit(c, heads) for c in channels])
        self.attend_by(how)

    def temporal(self, x: Tensor) -> list[Tensor]:
        """What each unit reads, [b, c, f', H, W]: middle, then after each up block."""
        b, _, _, height, width = x.shape

        def volume(y):
            return y.reshape(b, height, width, *y.shape[1:]).permute(0, 3, 4, 1, 2)

        y = self.conv_in_TempUnet(x.permute(0, 3, 4, 1, 2).flatten(0, 2))
        skips, found = [y], []
        for level in self.down_blocks_TempUnet:
            for resnet in level.resnets:
                y = resnet(y)
                skips.append(y)
            if hasattr(level, "downsamplers"):
                y = level.downsamplers[0].conv(y)
                skips.append(y)
        for resnet in self.mid_block_TempUnet.resnets:
            y = resnet(y)
        found.append(volume(y))
        for level in self.up_blocks_TempUnet:
            for resnet in level.resnets:
                y = resnet(torch.cat([y, skips.pop()], 1))
            if hasattr(level, "upsamplers"):
                y = F.interpolate(y, skips[-1].shape[-1], mode="nearest")
                y = level.upsamplers[0].conv(y)
            found.append(volume(y))
        return found

    def beside(self, x):
        """Runs the temporal U-Net; f(features, place) joins the two."""
        features = None if "temporal-unet" in self.without else self.temporal(x)
        units = [self.mid_stb_TempUnet, *self.up_stb_TempUnet]

        def join(x_spa: Tensor, place: int) -> Tensor:
            x_tem = x_spa if features is None else features[place]
            if "unit" in self.without:
                return x_spa + F.interpolate(x_tem, x_spa.shape[2:], mode="nearest")
            return units[place](x_spa, x_tem, self.without)

        return join


class Reference(tune_a_video.Reference):
    """The published code."""

    unet_class = VideoUNet
    tuned = (*tune_a_video.Reference.tuned, "_TempUnet")
    dead = ("down_stb_TempUnet.",)

    def rename(self, name):
        """Part X of the temporal U-Net is X_TempUnet."""
        return re.sub(r"^temporal_unet\.(\w+)\.", r"\1_TempUnet.", super().rename(name))
