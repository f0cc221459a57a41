"""EI2: other frames' coarse tokens gathered behind a frame's own, STAM under spectral norms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from tvkernels.benchmarks.reference import tune_a_video
from tvkernels.benchmarks.reference.attention import Attention

RATIO = 2
# Part of a spectrally normalised layer -> its name there.
SPECTRAL = {"weight": "weight_orig", "u": "weight_u", "v": "weight_v"}


class FineCoarseAttention(Attention):
    """z_FC = concat[z_i, {downsample(z_j)} of all j != i] is attended (eq. 10)."""

    def forward(self, x: Tensor, frames: int, size) -> Tensor:
        """[b * frames, h * w, dim] and (h, w); a ragged edge averages what is there."""
        images = x.transpose(1, 2).unflatten(2, size)
        coarse = F.avg_pool2d(images, RATIO, ceil_mode=True, count_include_pad=False)
        coarse = coarse.flatten(2).transpose(1, 2)
        others = [[j for j in range(frames) if j != i] for i in range(frames)]
        k, v = (self.gather(to, x, coarse, others) for to in (self.to_k, self.to_v))
        return self.finish(self.to_q(x), k, v)

    def gather(self, to: nn.Linear, x: Tensor, coarse: Tensor, others: list[list[int]]) -> Tensor:
        """[b * frames, h * w + (frames - 1) * coarse tokens, dim]."""
        fine, coarse = (to(y).unflatten(0, (-1, len(others))) for y in (x, coarse))
        rest = coarse[:, others].flatten(2, 3)
        return torch.cat([fine, rest], 2).flatten(0, 1)


class Centering(nn.Module):
    """z - mean over frames (eq. 6)."""

    def forward(self, z: Tensor) -> Tensor:
        """[positions, frames, dim]."""
        return z - z.mean(1, keepdim=True)


class Block(tune_a_video.Block):
    """Fine-coarse attention, and STAM (eq. 9) where Tune-A-Video attends over frames."""

    def frame_attention(self, dim, heads):
        """In place of self-attention."""
        return FineCoarseAttention(dim, heads)

    def temporal(self, dim, heads):
        """Values and output divided by their spectral norm, in every call (eq. 8)."""
        attention = Attention(dim, heads)
        attention.to_v = spectral_norm(attention.to_v)
        attention.to_out[0] = spectral_norm(attention.to_out[0])
        return Centering(), attention


class VideoUNet(tune_a_video.VideoUNet):
    """Tune-A-Video's with EI2's blocks.

    Training follows the singular vectors by one power iteration in each step. The norm that eq. 8
    divides by is their limit: evaluation takes them there, and training goes on where it was.
    """

    block = Block
    followed: dict[nn.Module, tuple[Tensor, Tensor]]

    def train(self, mode: bool = True):
        """As ever, with the vectors of that mode."""
        if mode != self.training:
            layers = [layer for layer in self.modules() if hasattr(layer, "weight_u")]
            if not mode:
                self.followed = {x: (x.weight_u.clone(), x.weight_v.clone()) for x in layers}
            for layer in layers:
                u, v = self.followed[layer] if mode else leading(layer.weight_orig)
                layer.weight_u.copy_(u)
                layer.weight_v.copy_(v)
        return super().train(mode)


@torch.no_grad()
def leading(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The singular vectors of the largest singular value."""
    left, _, right = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)))
    return left[:, 0], right[0]


class Reference(tune_a_video.Reference):
    """Tune-A-Video's code with EI2's modules; the paper has none of its own."""

    unet_class = VideoUNet

    def rename(self, name):
        """A normalised layer's parts have torch's names."""
        layer, _, part = name.rpartition(".")
        if layer.endswith(("attn_temp.to_v", "attn_temp.to_out.0")):
            return f"{layer}.{SPECTRAL.get(part, part)}"
        return name
