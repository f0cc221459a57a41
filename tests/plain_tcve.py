"""TCVE's UNet in plain PyTorch, written from its paper and the notes on its public code.

A witness that shares nothing with the package: the spatial half is `plain_tune_a_video`'s, the
temporal volume is (b h w) c f throughout, resized by torch, copied and permuted as it needs.
Parameters are named as published, the part after `_TempUnet` as the spatial U-Net's.
"""

import math

import torch
import torch.nn.functional as F
from plain_tune_a_video import PlainTuneAVideo
from torch import nn


class TemporalResNet(nn.Module):
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, c_in), nn.GroupNorm(groups, c_out)
        self.conv1, self.conv2 = (nn.Conv1d(c, c_out, 3, padding=1) for c in (c_in, c_out))
        self.conv_shortcut = nn.Conv1d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Change(nn.Module):
    def __init__(self, channels, stride):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, stride=stride, padding=1)


class Level(nn.Module):
    def __init__(self, channels, c_out, groups, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList([TemporalResNet(c, c_out, groups) for c in channels])
        if down:
            self.downsamplers = nn.ModuleList([Change(c_out, 2)])
        if up:
            self.upsamplers = nn.ModuleList([Change(c_out, 1)])


class Heads(nn.Module):
    """Softmax attention over the frames of each position, one position at a time."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for p in (self.to_q, self.to_k, self.to_v))  # fmt: skip
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return self.to_out[0]((weights @ v).transpose(1, 2).flatten(2))


class Unit(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.attn_temp, self.norm_temp = Heads(dim, heads), nn.LayerNorm(dim)
        self.norm, self.conv = nn.GroupNorm(8, dim), nn.Conv3d(dim, dim, 3, padding=1)

    def forward(self, x_spa, x_tem, parts=()):
        """Both [b, c, f, h, w]."""
        b, c, f, h, w = x_spa.shape
        x_tem = F.interpolate(x_tem, (f, h, w), mode="nearest")
        if "attention" not in parts:
            tokens = x_tem.permute(0, 3, 4, 2, 1).reshape(b * h * w, f, c)
            tokens = self.attn_temp(self.norm_temp(tokens))
            x_tem = tokens.reshape(b, h, w, f, c).permute(0, 4, 3, 1, 2)
        x = x_spa + 0.1 * x_tem
        return x if "convolution" in parts else x + F.silu(self.conv(self.norm(x)))


class PlainTCVE(PlainTuneAVideo):
    """[b, 4, f, h, w], t, text [b, L, context] -> [b, 4, f, h, w]."""

    def __init__(self, channels, layers, heads, context, groups):
        super().__init__(channels, layers, heads, context, groups)
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
        self.down_stb_TempUnet = nn.ModuleList([Unit(c, heads) for c in channels])  # dead

    def temporal(self, x):
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

    def forward(self, x, t, text, parts=()):
        """`parts` names what is left out: "temporal-unet", "unit", "attention", "convolution"."""
        features = None if "temporal-unet" in parts else self.temporal(x)

        def join(unit, x_spa, i):
            x_tem = x_spa if features is None else features[i]
            if "unit" in parts:
                return x_spa + F.interpolate(x_tem, x_spa.shape[2:], mode="nearest")
            return unit(x_spa, x_tem, parts)

        time = self.time_embedding(t, x.shape[0])
        x = self.conv_in(x)
        skips = [x]
        for level in self.down_blocks:
            for i, resnet in enumerate(level.resnets):
                x = resnet(x, time)
                x = level.attentions[i](x, text) if level.attentions else x
                skips.append(x)
            if hasattr(level, "downsamplers"):
                x = level.downsamplers[0](x)
                skips.append(x)
        mid = self.mid_block
        x = mid.resnets[1](mid.attentions[0](mid.resnets[0](x, time), text), time)
        x = join(self.mid_stb_TempUnet, x, 0)
        for number, level in enumerate(self.up_blocks):
            for i, resnet in enumerate(level.resnets):
                x = resnet(torch.cat([x, skips.pop()], 1), time)
                x = level.attentions[i](x, text) if level.attentions else x
            if hasattr(level, "upsamplers"):
                x = level.upsamplers[0](x, skips[-1].shape[-2:])
            x = join(self.up_stb_TempUnet[number], x, number + 1)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
