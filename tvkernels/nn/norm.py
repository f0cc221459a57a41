"""Norms whose statistics know that a batch is a clip."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tvkernels.ops.clip_group_norm.api import clip_group_norm
from tvkernels.ops.instance_center.api import instance_center


class InstanceCentering(nn.Module):
    """z - mean over frames, per position and channel, on [B, F, N, C] (EI2, eq. 6)."""

    def forward(self, z: Tensor) -> Tensor:
        """[B, F, N, C] -> the same shape."""
        return instance_center(z)


class InstanceNorm(nn.Module):
    """Centering and rescaling over frames, per position and channel (EI2's ablation, figure 4)."""

    def __init__(self, eps: float = 1e-5):
        super().__init__()
        self.eps = eps

    def forward(self, z: Tensor) -> Tensor:
        """[B, F, N, C] -> the same shape."""
        variance = z.var(1, correction=0, keepdim=True)
        return instance_center(z) * torch.rsqrt(variance + self.eps)


class ClipGroupNorm(nn.GroupNorm):
    """GroupNorm over whole clips: statistics of [B * F, C, h, w] pool over the F frames too.

    That is what the 5-D ResNets of Tune-A-Video, TCVE and their kin compute.

    Args:
        norm: the GroupNorm it stands in for, whose weight and bias it shares.
        clip: anything with `split`, which tells frames from samples.
    """

    def __init__(self, norm: nn.GroupNorm, clip):
        nn.Module.__init__(self)
        self.num_groups, self.num_channels = norm.num_groups, norm.num_channels
        self.eps, self.affine, self.clip = norm.eps, norm.affine, clip
        self.weight, self.bias = norm.weight, norm.bias
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """[B * F, C, h, w] -> the same shape."""
        clips = self.clip.split(x)
        if torch.is_autocast_enabled(x.device.type):  # where torch's own norm runs in float32 too
            clips = clips.to(self.weight.dtype)
        return clip_group_norm(
            clips, self.weight, self.bias, self.num_groups, eps=self.eps
        ).flatten(0, 1)
