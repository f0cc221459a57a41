"""Tune-A-Video's UNet in plain PyTorch, written from its paper and the notes on its public code.

A witness that shares nothing with the package: tensors are [b, c, f, h, w] throughout, the group
norms of the ResNets and the last one see all frames at once, keys and values are gathered and
concatenated, text is repeated for every frame. Modules are named as in the published checkpoints.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def frames_to_batch(x):
    """[b, c, f, h, w] -> [b * f, c, h, w]."""
    return x.transpose(1, 2).flatten(0, 1)


def batch_to_frames(x, frames):
    """[b * f, c, h, w] -> [b, c, f, h, w]."""
    return x.unflatten(0, (-1, frames)).transpose(1, 2)


class Conv(nn.Conv2d):
    """A convolution over space, frame by frame."""

    def forward(self, x):
        return batch_to_frames(super().forward(frames_to_batch(x)), x.shape[2])


class TimeEmbedding(nn.Module):
    def __init__(self, channels, width):
        super().__init__()
        self.channels = channels
        self.linear_1, self.linear_2 = nn.Linear(channels, width), nn.Linear(width, width)

    def forward(self, t, batch):
        half = self.channels // 2
        angles = t.float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
        waves = torch.cat([angles.cos(), angles.sin()]).to(self.linear_1.weight).expand(batch, -1)
        return self.linear_2(F.silu(self.linear_1(waves)))


class ResNet(nn.Module):
    def __init__(self, c_in, c_out, width, groups):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, c_in), nn.GroupNorm(groups, c_out)
        self.conv1, self.conv2 = Conv(c_in, c_out, 3, padding=1), Conv(c_out, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(width, c_out)
        self.conv_shortcut = Conv(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(time))[:, :, None, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    def __init__(self, dim, heads, context=None):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context or dim, dim, bias=False)
        self.to_v = nn.Linear(context or dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])

    def attend(self, q, k, v):
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.to_out[0]((weights @ v).transpose(1, 2).flatten(2))

    def forward(self, x, context=None):
        context = x if context is None else context
        return self.attend(self.to_q(x), self.to_k(context), self.to_v(context))


class SparseCausalAttention(Attention):
    """Keys and values of frame f are those of frames 0 and f - 1, one after the other."""

    def forward(self, x, frames):
        previous = [max(f - 1, 0) for f in range(frames)]
        k, v = (p(x).unflatten(0, (-1, frames)) for p in (self.to_k, self.to_v))
        k, v = (torch.cat([y[:, [0] * frames], y[:, previous]], 2).flatten(0, 1) for y in (k, v))
        return self.attend(self.to_q(x), k, v)


class GEGLU(nn.Module):
    def __init__(self, dim, inner):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, -1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Dropout(0.0), nn.Linear(4 * dim, dim))

    def forward(self, x):
        return self.net(x)


class Block(nn.Module):
    """Sparse-causal attention, text, feed-forward, then attention over frames."""

    def __init__(self, dim, heads, context):
        super().__init__()
        self.attn1, self.attn2 = SparseCausalAttention(dim, heads), Attention(dim, heads, context)
        self.attn_temp, self.ff = Attention(dim, heads), FeedForward(dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.norm_temp = nn.LayerNorm(dim)

    def forward(self, x, text, frames):
        x = x + self.attn1(self.norm1(x), frames)
        x = x + self.attn2(self.norm2(x), text)
        x = x + self.ff(self.norm3(x))
        tokens = x.shape[1]
        x = x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)
        x = x + self.attn_temp(self.norm_temp(x))
        return x.unflatten(0, (-1, tokens)).transpose(1, 2).flatten(0, 1)


class Transformer(nn.Module):
    """Its own group norm sees one frame at a time."""

    def __init__(self, dim, heads, context, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, dim, eps=1e-6)
        self.proj_in, self.proj_out = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList([Block(dim, heads, context)])

    def forward(self, x, text):
        frames, images = x.shape[2], frames_to_batch(x)
        h = self.proj_in(self.norm(images))
        tokens = h.flatten(2).transpose(1, 2)
        tokens = self.transformer_blocks[0](tokens, text.repeat_interleave(frames, 0), frames)
        h = self.proj_out(tokens.transpose(1, 2).unflatten(2, h.shape[2:]))
        return batch_to_frames(h + images, frames)


class Resize(nn.Module):
    """A convolution after doubling the size to that of the skip connection, or one of stride 2."""

    def __init__(self, channels, stride):
        super().__init__()
        self.conv = Conv(channels, channels, 3, stride=stride, padding=1)

    def forward(self, x, size=None):
        if size is not None:
            x = F.interpolate(x, (x.shape[2], *size), mode="nearest")
        return self.conv(x)


class Level(nn.Module):
    """One level of the UNet: ResNets, a transformer after each, then a change of size."""

    def __init__(self, channels, c_out, width, groups, heads, context, **resize):
        super().__init__()
        self.resnets = nn.ModuleList([ResNet(c, c_out, width, groups) for c in channels])
        self.attentions = nn.ModuleList()
        if heads:
            count = len(channels) if resize else len(channels) - 1
            layers = (Transformer(c_out, heads, context, groups) for _ in range(count))
            self.attentions = nn.ModuleList(layers)
        for name, stride in resize.items():
            if stride:
                setattr(self, name, nn.ModuleList([Resize(c_out, stride)]))


class PlainTuneAVideo(nn.Module):
    """[b, 4, f, h, w], t, text [b, L, context] -> [b, 4, f, h, w]."""

    def __init__(self, channels, layers, heads, context, groups):
        super().__init__()
        width, top = 4 * channels[0], len(channels) - 1
        common = {"width": width, "groups": groups, "context": context}
        self.conv_in = Conv(4, channels[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(channels[0], width)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips, c = [channels[0]], channels[0]
        for i, c_out in enumerate(channels):
            attend = heads if i < top else None
            sizes = [c] + [c_out] * (layers - 1)
            self.down_blocks.append(
                Level(sizes, c_out, heads=attend, downsamplers=2 * (i < top), **common)
            )
            skips += [c_out] * (layers + (i < top))
            c = c_out
        self.mid_block = Level([c, c], c, heads=heads, **common)
        for i, c_out in enumerate(reversed(channels)):
            sizes = []
            for _ in range(layers + 1):
                sizes.append(c + skips.pop())
                c = c_out
            attend = heads if i else None
            self.up_blocks.append(
                Level(sizes, c_out, heads=attend, upsamplers=int(i < top), **common)
            )
        self.conv_norm_out = nn.GroupNorm(groups, channels[0])
        self.conv_out = Conv(channels[0], 4, 3, padding=1)

    def forward(self, x, t, text):
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
        for level in self.up_blocks:
            for i, resnet in enumerate(level.resnets):
                x = resnet(torch.cat([x, skips.pop()], 1), time)
                x = level.attentions[i](x, text) if level.attentions else x
            if hasattr(level, "upsamplers"):
                x = level.upsamplers[0](x, skips[-1].shape[-2:])
        return self.conv_out(F.silu(self.conv_norm_out(x)))
