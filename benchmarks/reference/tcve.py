"""TCVE: Tune-A-Video's UNet with a temporal U-Net beside it on (b h w) c f, joined in volumes.

As in the published code, each temporal layer stands beside a spatial one, `_TempUnet` behind its
name. Two things differ from that code, as in ours: any number of frames, where it needs a multiple
of eight, and positions that stay where they are, where it reads the volume by another height.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvkernels.benchmarks.reference import tune_a_video
from tvkernels.benchmarks.reference.attention import Attention
from tvkernels.benchmarks.reference.layers import ResNet

WEIGHT = 0.1


def widen(resnet: ResNet) -> None:
    """Puts a temporal ResNet beside a spatial one; its norm sees one position."""
    c_in, c_out = resnet.conv1.in_channels, resnet.conv1.out_channels
    resnet.norm1_TempUnet = nn.GroupNorm(resnet.norm1.num_groups, c_in)
    resnet.conv1_TempUnet = nn.Conv1d(c_in, c_out, 3, padding=1)
    if resnet.conv_shortcut is not None:
        resnet.conv_shortcut_TempUnet = nn.Conv1d(c_in, c_out, 1)


def convolve(resnet: ResNet, x: Tensor) -> Tensor:
    """The temporal one, [b * h * w, c_in, f] -> [b * h * w, c_out, f]."""
    h = resnet.conv1_TempUnet(F.silu(resnet.norm1_TempUnet(x)))
    return h + (x if resnet.conv_shortcut is None else resnet.conv_shortcut_TempUnet(x))


class Unit(nn.Module):
    """X_spa + SiLU(Conv3d(GroupNorm(X_spa + 0.1 X_att))), X_att with residual (eq. 7)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attn_temp, self.norm_temp = Attention(dim, heads), nn.LayerNorm(dim)
        self.norm, self.conv_3d = nn.GroupNorm(8, dim), nn.Conv3d(dim, dim, 3, padding=1)

    def forward(self, x_spa: Tensor, x_tem: Tensor, without=()) -> Tensor:
        """Both [b, c, f, h, w], the temporal volume of any size."""
        b, c, f, h, w = x_spa.shape
        x_tem = F.interpolate(x_tem, (f, h, w), mode="nearest")
        if "attention" not in without:
            tokens = x_tem.permute(0, 3, 4, 2, 1).reshape(b * h * w, f, c)
            tokens = tokens + self.attn_temp(self.norm_temp(tokens))
            x_tem = tokens.reshape(b, h, w, f, c).permute(0, 4, 3, 1, 2)
        x = x_spa + WEIGHT * x_tem
        return x if "convolution" in without else x_spa + F.silu(self.conv_3d(self.norm(x)))


class VideoUNet(tune_a_video.VideoUNet):
    """Tune-A-Video's, and the temporal U-Net.

    Attributes:
        without: what the ablations leave out, of "temporal-unet", "unit", "attention" and
            "convolution".
    """

    without: tuple[str, ...] = ()

    def __init__(self, channels, layers: int, heads: int, context: int, groups: int, how="math"):
        super().__init__(channels, layers, heads, context, groups, how)
        self.conv_in_TempUnet = nn.Conv1d(4, channels[0], 7, padding=3)
        for level in (*self.down_blocks, self.mid_block, *self.up_blocks):
            for resnet in level.resnets:
                widen(resnet)
        for level, c in zip(self.down_blocks[:-1], channels, strict=False):
            level.downsamplers[0].conv_TempUnet = nn.Conv1d(c, c, 3, stride=2, padding=1)
        for level, c in zip(self.up_blocks[:-1], reversed(channels), strict=False):
            conv = nn.Conv1d(c, c, 3, padding=1)
            level.upsamplers[0].upsample_TempUnet = nn.ModuleList([nn.Identity(), conv])
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
        for level in self.down_blocks:
            for resnet in level.resnets:
                y = convolve(resnet, y)
                skips.append(y)
            if hasattr(level, "downsamplers"):
                y = level.downsamplers[0].conv_TempUnet(y)
                skips.append(y)
        for resnet in self.mid_block.resnets:
            y = convolve(resnet, y)
        found.append(volume(y))
        for level in self.up_blocks:
            for resnet in level.resnets:
                y = convolve(resnet, torch.cat([y, skips.pop()], 1))
            if hasattr(level, "upsamplers"):
                y = F.interpolate(y, skips[-1].shape[-1], mode="nearest")
                y = level.upsamplers[0].upsample_TempUnet[1](y)
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
        """_TempUnet ends a unit's name, and that of each layer of the temporal U-Net."""
        own = name.removeprefix("temporal_unet.")
        if own == name:
            return super().rename(name)
        own = own.replace("attn_temp.norm.", "norm_temp.")
        if "_stb." in own:
            return own.replace("_stb.", "_stb_TempUnet.").replace(".conv.", ".conv_3d.")
        layer, _, part = own.rpartition(".")
        if "upsamplers" in layer:
            return f"{layer.removesuffix('conv')}upsample_TempUnet.1.{part}"
        return f"{layer}_TempUnet.{part}"
