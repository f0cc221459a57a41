"""What diffusers calls: its `AttnProcessor2_0` step by step, with our ops in the middle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tvkernels.ops.frame_attention.api import frame_attention
from tvkernels.ops.temporal_attention.api import temporal_attention
from tvkernels.ops.token_map_attention.api import token_map_attention
from tvkernels.patterns import FramePattern, FrameTable
from tvkernels.processors.clip import Clip, Span
from tvkernels.processors.libraries import attention
from tvkernels.processors.maps import TokenMaps

Tables = Sequence[FrameTable] | None


def project_context(attn, context: Tensor, cross: bool = False) -> tuple[Tensor, Tensor]:
    """Keys and values [B, L, heads, head dim] of a layer for `context` [B, L, C'].

    Args:
        attn: the diffusers `Attention` layer.
        context: text states, or a self-attention's own tokens.
        cross: whether it is text, which some layers normalise first.
    """
    if cross and attn.norm_cross:
        context = attn.norm_encoder_hidden_states(context)
    k, v = (project(context).unflatten(-1, (attn.heads, -1)) for project in (attn.to_k, attn.to_v))
    return (k if attn.norm_k is None else attn.norm_k(k)), v


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
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, num_frames: int | None, tables: Tables
    ) -> Tensor:
        """[batch, tokens, heads, head dim] of queries, keys and values -> the queries' results."""
        raise NotImplementedError

    def attend_mapped(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, num_frames: int | None,
        tables: Tables, maps: TokenMaps,
    ) -> Tensor:  # fmt: skip
        """`attend` in a call that asks for maps of words, for layers that have any."""
        return self.attend(q, k, v, scale, num_frames, tables)

    def read_context(self, attn, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of cross-attention."""
        return project_context(attn, context, cross=True)

    def __call__(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        num_frames: int | None = None,
        tables: Tables = None,
        maps: TokenMaps | None = None,
    ) -> Tensor:
        """diffusers' processor contract.

        Args:
            attn: the diffusers `Attention` layer.
            hidden_states: [B * F, N, C] or [B * F, C, h, w].
            encoder_hidden_states: [B or B * F, L, C'] text, or None for self-attention.
            attention_mask: must be None; a mask cannot be honoured and is never dropped.
            temb: time embedding of layers with a spatial norm.
            num_frames: frames per clip where no handle tells.
            tables: compiled patterns in place of the processors' own, see `Handle.tables`.
            maps: takes the maps of its words from the layers that it wants to see.
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
        q = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        q = q if attn.norm_q is None else attn.norm_q(q)
        if encoder_hidden_states is None:
            k, v = project_context(attn, hidden_states)
        else:
            k, v = self.read_context(attn, encoder_hidden_states)
        if maps is None:
            out = self.attend(q, k, v, attn.scale, num_frames, tables)
        else:
            out = self.attend_mapped(q, k, v, attn.scale, num_frames, tables, maps)
        out = out.flatten(2).to(q.dtype)
        out = attn.to_out[1](attn.to_out[0](out))
        if picture is not None:
            out = out.transpose(1, 2).unflatten(2, picture[1:])
        if attn.residual_connection:
            out = out + residual
        # By 1, which it is in every SD model, the division would copy the whole activation.
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


class FrameAttnProcessor(AttnProcessor):
    """Self-attention in which each frame reads the frames of a pattern.

    Args:
        pattern: which frames each frame reads; itself alone if None.
        clip, backend: as for `AttnProcessor`.
        index: the pattern's place among the tables that a call brings.
    """

    def __init__(
        self,
        pattern: FramePattern | None = None,
        clip: Clip | None = None,
        backend: str = "auto",
        index: int = 0,
    ):
        super().__init__(clip, backend)
        self.pattern, self.index = pattern or FramePattern.own(), index

    def attend(self, q, k, v, scale, num_frames, tables):
        """One `frame_attention` over [B, F, N, H, D]."""
        if q.shape[1] != k.shape[1]:
            raise ValueError("FrameAttnProcessor serves self-attention layers only")
        images = None if torch.compiler.is_compiling() else self.clip.images
        if images not in (None, q.shape[0]) and not self.pattern.is_own:
            raise ValueError(
                f"{q.shape[0]} sequences of tokens for {images} frames: something cuts frames "
                "into windows, where no frame can read another's"
            )
        q, k, v = (self.clip.split(x, num_frames) for x in (q, k, v))
        grid = self.clip.grid(q.shape[2])
        pattern = self.pattern if tables is None else tables[self.index]
        out = frame_attention(q, k, v, pattern, grid=grid, scale=scale, backend=self.backend)
        return out.flatten(0, 1)


class LibraryAttnProcessor(AttnProcessor):
    """Self-attention within each frame by a library that is chosen by name.

    Args:
        library: a name of `libraries.LIBRARIES`.
        clip: as for `AttnProcessor`.
    """

    def __init__(self, library: str, clip: Clip | None = None):
        super().__init__(clip, library)
        self.library = attention(library)

    def attend(self, q, k, v, scale, num_frames, tables):
        """A frame each is a sequence of its own."""
        if q.shape[1] != k.shape[1]:
            raise ValueError("LibraryAttnProcessor serves self-attention layers only")
        return self.library(q, k, v, scale)


class TextAttnProcessor(AttnProcessor):
    """Cross-attention whose text is [B, L, C]: projected once for all frames of a clip.

    Args:
        clip: as for `AttnProcessor`.
        span: where this layer's keys and values lie in text that `InflatedHandle.project_text`
            has projected already, for all steps of an edit; None if there is no such text.
        library: a name of `libraries.LIBRARIES`.
        backend: of the op that attends where a call asks for maps of words.
    """

    def __init__(
        self,
        clip: Clip | None = None,
        span: Span | None = None,
        library: str = "sdpa",
        backend: str = "auto",
    ):
        super().__init__(clip, backend)
        self.span, self.library = span, attention(library)

    def read_context(self, attn, context):
        """Keys and values from text states [B, L, C], or from projected text [B, L, total]."""
        if self.span is None or context.shape[-1] != self.span.total:
            return project_context(attn, context, cross=True)
        return self.span.read(context).unflatten(-1, (2, attn.heads, -1)).unbind(-3)

    def attend(self, q, k, v, scale, num_frames, tables):
        """All frames of a sample are queries of one call."""
        self._check_texts(q, k, num_frames)
        shape = q.shape
        q = q.reshape(k.shape[0], -1, *shape[2:])
        return self.library(q, k, v, scale).reshape(shape)

    def attend_mapped(self, q, k, v, scale, num_frames, tables, maps):
        """`token_map_attention` in the layers that are to be seen."""
        grid = self.clip.grid(q.shape[1])
        if not maps.wants(grid, self.clip.size):
            return self.attend(q, k, v, scale, num_frames, tables)
        frames = self._check_texts(q, k, num_frames)
        apart = q.unflatten(0, (k.shape[0], q.shape[0] // k.shape[0]))
        out, found = token_map_attention(
            apart, k, v, maps.tokens, scale=scale, backend=self.backend
        )
        maps.add(found.reshape(-1, frames, *found.shape[2:]), grid)
        return out.flatten(0, 1)

    def _check_texts(self, q: Tensor, k: Tensor, num_frames: int | None) -> int:
        frames = self.clip.frames(q.shape[0], num_frames)
        clips = q.shape[0] // frames
        if k.shape[0] != clips and k.shape[0] != q.shape[0]:  # "in" would not take symbols
            raise ValueError(
                f"{k.shape[0]} texts for {q.shape[0]} images in {clips} clips: "
                "text is [B, L, C] for images [B * F, ...]"
            )
        return frames


class TemporalAttnProcessor(AttnProcessor):
    """Self-attention of motion modules: [B * h * w, F, C], one sequence of frames per position."""

    def attend(self, q, k, v, scale, num_frames, tables):
        """`temporal_attention` with each sequence a batch of one position."""
        q, k, v = (x.unsqueeze(2) for x in (q, k, v))
        return temporal_attention(q, k, v, scale=scale, backend=self.backend).squeeze(2)
