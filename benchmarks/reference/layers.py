"""Layers of the inflated UNets: [b, c, f, h, w] throughout, named as in published checkpoints."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def frames_to_batch(x: Tensor) -> Tensor:
    """[b, c, f, h, w] -> [b * f, c, h, w]."""
    return x.transpose(1, 2).flatten(0, 1)


def batch_to_frames(x: Tensor, frames: int) -> Tensor:
    """[b * f, c, h, w] -> [b, c, f, h, w]."""
    return x.unflatten(0, (-1, frames)).transpose(1, 2)


class Conv(nn.Conv2d):
    """A convolution over space, frame by frame."""

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, f, h, w]."""
        return batch_to_frames(super().forward(frames_to_batch(x)), x.shape[2])


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep, cosines first, and two linear layers."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.channels = channels
        self.linear_1, self.linear_2 = nn.Linear(channels, width), nn.Linear(width, width)

    def forward(self, t: Tensor, batch: int) -> Tensor:
        """One timestep -> [batch, width]."""
        half = self.channels // 2
        steps = torch.arange(half, device=self.linear_1.weight.device)
        angles = t.to(steps.device).float() * torch.exp(-math.log(10000) * steps / half)
        waves = torch.cat([angles.cos(), angles.sin()]).to(self.linear_1.weight).expand(batch, -1)
        return self.linear_2(F.silu(self.linear_1(waves)))


class ResNet(nn.Module):
    """Its group norms see all frames of a clip at once, as 5-D ones do."""

    def __init__(self, c_in: int, c_out: int, width: int, groups: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, c_in), nn.GroupNorm(groups, c_out)
        self.conv1, self.conv2 = Conv(c_in, c_out, 3, padding=1), Conv(c_out, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(width, c_out)
        self.conv_shortcut = Conv(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """[b, c_in, f, h, w] -> [b, c_out, f, h, w]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(time))[:, :, None, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Resize(nn.Module):
    """A convolution after doubling the size to that of the skip connection, or one of stride 2."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.conv = Conv(channels, channels, 3, stride=stride, padding=1)

    def forward(self, x: Tensor, size=None) -> Tensor:
        """[b, c, f, h, w]; size is the (h, w) to grow to."""
        if size is not None:
            x = F.interpolate(x, (x.shape[2], *size), mode="nearest")
        return self.conv(x)


class GEGLU(nn.Module):
    """A linear layer and the gate that it is multiplied by."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., inner]."""
        x, gate = self.proj(x).chunk(2, -1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Dropout(0.0), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim]."""
        return self.net(x)
