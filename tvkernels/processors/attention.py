"""What diffusers calls: its `AttnProcessor2_0` step by step, with our ops in the middle."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tvkernels.ops.frame_attention.api import frame_attention
from tvkernels.ops.temporal_attention.api import temporal_attention
from tvkernels.patterns import FramePattern
from tvkernels.processors.clip import Clip


class AttnProcessor:
    """The sequence every diffusers processor keeps; subclasses attend.

    Projections are called as modules, so LoRA, quantised and layerwise-cast layers keep working.

    Args:
        clip: the call's frame count and size, shared by a model's layers.
        backend: of the op that attends.
    """

    def __init__(self, clip: Clip | None = None, backend: str = "auto"):
        self.clip, self.backend = clip or Clip(), backend

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, num_frames: int | None
    ) -> Tensor:
        """[batch, tokens, heads, head dim] of queries, keys and values -> the queries' results."""
        raise NotImplementedError

    def __call__(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        num_frames: int | None = None,
    ) -> Tensor:
        """diffusers' processor contract.

        Args:
            attn: the diffusers `Attention` layer.
            hidden_states: [B * F, N, C] or [B * F, C, h, w].
            encoder_hidden_states: [B or B * F, L, C'] text, or None for self-attention.
            attention_mask: must be None; a mask cannot be honoured and is never dropped.
            temb: time embedding of layers with a spatial norm.
            num_frames: frames per clip where no handle tells.
        Returns:
            A tensor of hidden_states' shape.
        """
        if attention_mask is not None:
            raise ValueError(
                f"{type(self).__name__} cannot honour an attention_mask: call the model "
                "without one or remove the processor"
            )
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        picture = hidden_states.shape[1:] if hidden_states.dim() == 4 else None
        if picture is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (q, k, v))
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        out = self.attend(q, k, v, attn.scale, num_frames).flatten(2).to(q.dtype)
        out = attn.to_out[1](attn.to_out[0](out))
        if picture is not None:
            out = out.transpose(1, 2).unflatten(2, picture[1:])
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor


class FrameAttnProcessor(AttnProcessor):
    """Self-attention in which each frame reads the frames of a pattern.

    Args:
        pattern: which frames each frame reads; itself alone if None.
        clip, backend: as for `AttnProcessor`.
    """

    def __init__(
        self, pattern: FramePattern | None = None, clip: Clip | None = None, backend: str = "auto"
    ):
        super().__init__(clip, backend)
        self.pattern = pattern or FramePattern.own()

    def attend(self, q, k, v, scale, num_frames):
        """One `frame_attention` over [B, F, N, H, D]."""
        if q.shape[1] != k.shape[1]:
            raise ValueError("FrameAttnProcessor serves self-attention layers only")
        q, k, v = (self.clip.split(x, num_frames) for x in (q, k, v))
        grid = self.clip.grid(q.shape[2])
        out = frame_attention(q, k, v, self.pattern, grid=grid, scale=scale, backend=self.backend)
        return out.flatten(0, 1)


class TextAttnProcessor(AttnProcessor):
    """Cross-attention whose text is [B, L, C]: projected once for all frames of a clip."""

    def attend(self, q, k, v, scale, num_frames):
        """All frames of a sample are queries of one call."""
        clips = q.shape[0] // self.clip.frames(q.shape[0], num_frames)
        if k.shape[0] not in (clips, q.shape[0]):
            raise ValueError(
                f"{k.shape[0]} texts for {q.shape[0]} images in {clips} clips: "
                "text is [B, L, C] for images [B * F, ...]"
            )
        shape = q.shape
        q = q.reshape(k.shape[0], -1, *shape[2:])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return out.transpose(1, 2).reshape(shape)


class TemporalAttnProcessor(AttnProcessor):
    """Self-attention of motion modules: [B * h * w, F, C], one sequence of frames per position."""

    def attend(self, q, k, v, scale, num_frames):
        """`temporal_attention` with each sequence a batch of one position."""
        q, k, v = (x.unsqueeze(2) for x in (q, k, v))
        return temporal_attention(q, k, v, scale=scale, backend=self.backend).squeeze(2)
