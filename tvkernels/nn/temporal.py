"""Attention over frames with a residual: Tune-A-Video's module and EI2's STAM."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tvkernels.nn.norm import InstanceCentering, InstanceNorm
from tvkernels.nn.spectral import SpectralLinear
from tvkernels.ops.shift_restricted_temporal_attention.api import (
    shift_restricted_temporal_attention,
)
from tvkernels.ops.temporal_attention.api import temporal_attention
from tvkernels.processors.touched import is_plain

NORMS = {
    "layer_norm": nn.LayerNorm,
    "layer_norm_plain": lambda dim: nn.LayerNorm(dim, elementwise_affine=False),
    "none": lambda dim: nn.Identity(),
    "instance_norm": lambda dim: InstanceNorm(),
    "centering": lambda dim: InstanceCentering(),
}


class TemporalAttention(nn.Module):
    """z + to_out(Attention(norm(z))) over the frames of each position (Tune-A-Video, section 3.2).

    Full F x F attention without positions and without mask. Parameter names are the published
    checkpoints' (`attn_temp.to_q` ...), but for the norm, theirs being `norm_temp`.

    Args:
        dim: channels C.
        heads: attention heads; C must be a multiple.
        norm: a key of `NORMS`.
        start: see `tvkernels.recipes.TemporalModule`.
    """

    linear_out: type[nn.Linear] = nn.Linear

    def __init__(self, dim: int, heads: int, norm: str = "layer_norm", start: str = "zero_weight"):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{dim} channels do not divide into {heads} heads")
        self.heads = heads
        self.norm = NORMS[norm](dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = self.linear_out(dim, dim, bias=False)
        self.to_out = nn.ModuleList([self.linear_out(dim, dim), nn.Dropout(0.0)])
        out = self.to_out[0]
        nn.init.zeros_({"zero_weight": out.weight, "zero_bias": out.bias}[start])

    def forward(self, z: Tensor) -> Tensor:
        """[B, F, N, C] -> the same shape."""
        return z + self.attend(z)

    def attend(self, z: Tensor) -> Tensor:
        """What is added to z."""
        hidden = self.norm(z)
        q, k, v = (
            project(hidden).unflatten(-1, (self.heads, -1))
            for project in (self.to_q, self.to_k, self.to_v)
        )
        out = temporal_attention(q, k, v).flatten(3)
        return self.to_out[1](self.to_out[0](out))


class ShiftRestrictedTemporalAttention(TemporalAttention):
    """STAM: centering instead of a norm, W_v and W_L spectrally normalised (EI2, eq. 6, 8, 9).

    Args:
        dim, heads: as for `TemporalAttention`.
    """

    linear_out = SpectralLinear

    def __init__(self, dim: int, heads: int):
        super().__init__(dim, heads, norm="centering", start="zero_bias")

    def forward(self, z: Tensor) -> Tensor:
        """[B, F, N, C] -> the same shape."""
        q, k, v, out = self.to_q, self.to_k, self.to_v, self.to_out[0]
        plain = is_plain(q, nn.Linear) and is_plain(k, nn.Linear)
        plain = plain and is_plain(v, SpectralLinear) and is_plain(out, SpectralLinear)
        if not plain or torch.is_autocast_enabled(z.device.type):
            # LoRA, quantised and offloaded layers, and autocast, work only on layers called as
            # modules.
            return super().forward(z)
        return shift_restricted_temporal_attention(
            z,
            q.weight,
            k.weight,
            v.weight,
            out.weight,
            out.bias,
            heads=self.heads,
            sigma_v=v.sigma,
            sigma_out=out.sigma,
        )
