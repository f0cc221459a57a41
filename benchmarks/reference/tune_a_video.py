"""Tune-A-Video: sparse-causal attention by gathering, attention over frames by permuting."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvkernels.benchmarks.reference import loop
from tvkernels.benchmarks.reference.attention import Attention
from tvkernels.benchmarks.reference.layers import (
    Conv,
    FeedForward,
    Resize,
    ResNet,
    TimeEmbedding,
    batch_to_frames,
    frames_to_batch,
)

SD_BLOCKS = {
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}


class SparseCausalAttention(Attention):
    """Keys and values of frame f are those of frames 0 and f - 1, one after the other."""

    def forward(self, x: Tensor, frames: int, size=None) -> Tensor:
        """[b * frames, tokens, dim]."""
        previous = [max(f - 1, 0) for f in range(frames)]
        k, v = (project(x).unflatten(0, (-1, frames)) for project in (self.to_k, self.to_v))
        k, v = (torch.cat([y[:, [0] * frames], y[:, previous]], 2).flatten(0, 1) for y in (k, v))
        return self.finish(self.to_q(x), k, v)


class Block(nn.Module):
    """Attention of frames, text, feed-forward, then attention over frames."""

    def __init__(self, dim: int, heads: int, context: int):
        super().__init__()
        self.attn1, self.attn2 = self.frame_attention(dim, heads), Attention(dim, heads, context)
        self.ff = FeedForward(dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.norm_temp, self.attn_temp = self.temporal(dim, heads)

    def frame_attention(self, dim: int, heads: int) -> Attention:
        """In place of self-attention."""
        return SparseCausalAttention(dim, heads)

    def temporal(self, dim: int, heads: int) -> tuple[nn.Module, Attention]:
        """The norm before the attention over frames, and that."""
        return nn.LayerNorm(dim), Attention(dim, heads)

    def forward(self, x: Tensor, text: Tensor, frames: int, size) -> Tensor:
        """[b * frames, tokens, dim], its text [b * frames, L, context], and (h, w)."""
        x = x + self.attn1(self.norm1(x), frames, size)
        x = x + self.attn2(self.norm2(x), text)
        x = x + self.ff(self.norm3(x))
        tokens = x.shape[1]
        x = x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)
        x = x + self.attn_temp(self.norm_temp(x))
        return x.unflatten(0, (-1, tokens)).transpose(1, 2).flatten(0, 1)


class Transformer(nn.Module):
    """Its own group norm sees one frame at a time."""

    def __init__(self, block: nn.Module, dim: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, dim, eps=1e-6)
        self.proj_in, self.proj_out = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList([block])

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """[b, c, f, h, w], text [b, L, context]."""
        frames, images = x.shape[2], frames_to_batch(x)
        h = self.proj_in(self.norm(images))
        size, tokens = h.shape[2:], h.flatten(2).transpose(1, 2)
        text = text.repeat_interleave(frames, 0)
        tokens = self.transformer_blocks[0](tokens, text, frames, size)
        h = self.proj_out(tokens.transpose(1, 2).unflatten(2, size))
        return batch_to_frames(h + images, frames)


class Level(nn.Module):
    """ResNets, a transformer after each, then a change of size."""

    def __init__(self, channels, c_out: int, width: int, groups: int, block=None, **resize):
        super().__init__()
        self.resnets = nn.ModuleList([ResNet(c, c_out, width, groups) for c in channels])
        self.attentions = nn.ModuleList()
        if block:
            count = len(channels) if resize else len(channels) - 1
            layers = (Transformer(block(c_out), c_out, groups) for _ in range(count))
            self.attentions = nn.ModuleList(layers)
        for name, stride in resize.items():
            if stride:
                setattr(self, name, nn.ModuleList([Resize(c_out, stride)]))


class VideoUNet(nn.Module):
    """[b, 4, f, h, w], t, text [b, L, context] -> [b, 4, f, h, w]; sizes as Stable Diffusion's.

    Args:
        channels: of each level.
        layers: ResNets of a level going down; one more going up.
        heads, context, groups: of attention, the text's width, of the norms.
        how: attention, "math" or "sdpa".
    """

    block = Block

    def __init__(self, channels, layers: int, heads: int, context: int, groups: int, how="math"):
        super().__init__()
        width, top = 4 * channels[0], len(channels) - 1
        common = {"width": width, "groups": groups}

        def block(dim: int) -> nn.Module:
            return self.block(dim, heads, context)

        self.conv_in = Conv(4, channels[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(channels[0], width)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips, c = [channels[0]], channels[0]
        for i, c_out in enumerate(channels):
            sizes, attends = [c] + [c_out] * (layers - 1), block if i < top else None
            level = Level(sizes, c_out, block=attends, downsamplers=2 * (i < top), **common)
            self.down_blocks.append(level)
            skips += [c_out] * (layers + (i < top))
            c = c_out
        self.mid_block = Level([c, c], c, block=block, **common)
        for i, c_out in enumerate(reversed(channels)):
            sizes, attends = [], block if i else None
            for _ in range(layers + 1):
                sizes.append(c + skips.pop())
                c = c_out
            level = Level(sizes, c_out, block=attends, upsamplers=int(i < top), **common)
            self.up_blocks.append(level)
        self.conv_norm_out = nn.GroupNorm(groups, channels[0])
        self.conv_out = Conv(channels[0], 4, 3, padding=1)
        self.attend_by(how)

    def attend_by(self, how: str) -> None:
        """Has every attention be "math" or "sdpa"."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.how = how

    @classmethod
    def like(cls, config, how: str = "math") -> VideoUNet:
        """Of the sizes in a UNet2DConditionModel's configuration.

        Raises:
            ValueError: not Stable Diffusion 1.x's blocks.
        """
        heads = getattr(config, "num_attention_heads", None) or config.attention_head_dim
        blocks = {name: tuple(getattr(config, name)) for name in SD_BLOCKS}
        if blocks != SD_BLOCKS or config.mid_block_type is None or not isinstance(heads, int):
            raise ValueError("the reference needs the blocks of Stable Diffusion 1.x")
        return cls(
            config.block_out_channels, config.layers_per_block, heads,
            config.cross_attention_dim, config.norm_num_groups, how,
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The noise in x."""
        join = self.beside(x)
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
        x = join(x, 0)
        for number, level in enumerate(self.up_blocks, 1):
            for i, resnet in enumerate(level.resnets):
                x = resnet(torch.cat([x, skips.pop()], 1), time)
                x = level.attentions[i](x, text) if level.attentions else x
            if hasattr(level, "upsamplers"):
                x = level.upsamplers[0](x, skips[-1].shape[-2:])
            x = join(x, number)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def beside(self, x: Tensor):
        """What TCVE runs beside it: f(features, place), after the middle and each up block."""
        return lambda features, place: features


class Reference(loop.Reference):
    """The published code; its `norm_temp` stays frozen there and is tuned here, as in ours."""

    unet_class = VideoUNet
    tuned = ("attn1.to_q", "attn2.to_q", "attn_temp", "norm_temp")

    def build(self, config, attention):
        """The 5-D UNet."""
        return self.unet_class.like(config, attention)

    def rename(self, name):
        """The norm before attention over frames is the block's."""
        return name.replace(".attn_temp.norm.", ".norm_temp.")

    def predict(self, latents, t, text):
        """[1, 4, F, h, w], once for each text."""
        clips = torch.cat([latents.transpose(0, 1)[None]] * len(text))
        return self.unet(clips, t, text).transpose(1, 2)
