"""The timestep's way into a UNet: once a call, or once a schedule, instead of once an image.

Both are `forward`s put on diffusers' own modules, which keep their names and places: what adapters
replace later is replaced, and a row is refused where it would pass by them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tvkernels.processors.clip import Clip, Span
from tvkernels.processors.touched import untouched


def embed(forward: Callable, clip: Clip, sample: Tensor, condition: Tensor | None = None):
    """A UNet's `time_embedding`: [B * F, C] sinusoids -> [1 or B * F, E].

    One row where one timestep serves all, as what follows broadcasts over the batch; `condition`,
    a row of a `TimeTable`, as it is.
    """
    if condition is not None:
        return condition
    return forward(sample[:1] if clip.one_time else sample)


def project(forward: Callable, span: Span, temb: Tensor) -> Tensor:
    """A ResNet's `time_emb_proj`: [n, E] embeddings, or a row of a `TimeTable` -> [n, C]."""
    return span.read(temb) if temb.shape[-1] == span.total else forward(temb)


@dataclass
class Projection:
    """One ResNet's part of a `TimeTable`.

    Args:
        resnet: diffusers' ResnetBlock2D.
        layer: its `time_emb_proj` when it was inflated.
        forward: what stands as that layer's `forward`.
        span: its part of a row.
        activated: whether the ResNet takes embeddings that are activated already.
    """

    resnet: nn.Module
    layer: nn.Module
    forward: partial
    span: Span
    activated: bool

    def in_place(self) -> bool:
        """Whether a row still gives what the ResNet's own layer would."""
        there = self.resnet.time_emb_proj
        return there is self.layer and untouched(there, self.forward)


@dataclass
class TimeTable:
    """What every ResNet of a UNet adds for its timestep, in rows of one timestep each.

    Args:
        unet: diffusers' UNet2DConditionModel.
        embedding: its `time_embedding` when it was inflated.
        forward: what stands as that module's `forward`.
        clip: of the call under way.
        projections: of all ResNets.
    """

    unet: nn.Module
    embedding: nn.Module
    forward: partial
    clip: Clip
    projections: list[Projection]

    @property
    def width(self) -> int:
        """Of a row."""
        return self.projections[0].span.total

    def in_place(self) -> bool:
        """Whether rows are good: no hook or adapter would be passed by or run twice."""
        there = self.unet.time_embedding
        own = there is self.embedding and untouched(there, self.forward)
        own = own and all(untouched(part) for part in there.children())
        return own and all(part.in_place() for part in self.projections)

    def rows(self, timesteps: Tensor) -> Tensor:
        """[S] -> [S, width], by the modules that are there."""
        self.clip.one_time = False
        embedded = self.unet.time_embedding(self.unet.time_proj(timesteps).to(self.unet.dtype))
        active = [
            part.resnet.time_emb_proj(
                embedded if part.activated else part.resnet.nonlinearity(embedded)
            )
            for part in self.projections
        ]
        return torch.cat(active, -1)

    def begin(self, known: bool) -> None:
        """Before a call of the UNet: whether it brings a row, which no ResNet activates."""
        for part in self.projections:
            part.resnet.skip_time_act = known or part.activated
