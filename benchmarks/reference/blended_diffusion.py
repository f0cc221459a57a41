"""Blended latent diffusion under attention control, with every map stored as in Prompt-to-Prompt.

The paper has no code: DDIM by eq. 2 and 4, masks by eq. 5, blending by eq. 3, frames f - 1 and f
concatenated by eq. 6. The ablations, another background and no mask, are left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

from tvkernels.benchmarks.reference import frame_by_frame
from tvkernels.benchmarks.reference.attention import (
    attend,
    batch_to_heads,
    heads_to_batch,
    probabilities,
)


class Processor:
    """Self-attention reads [f - 1; f]; cross-attention leaves its whole map, whatever `how`."""

    def __init__(self, how: str):
        self.how, self.frames, self.maps = how, 1, []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        """As diffusers calls it."""
        crosses = encoder_hidden_states is not None
        context = encoder_hidden_states if crosses else hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        if crosses:
            q, k, v = (heads_to_batch(x, attn.heads) for x in (q, k, v))
            seen = probabilities(q, k)
            self.maps.append(seen.unflatten(0, (-1, attn.heads)))
            out = batch_to_heads(torch.bmm(seen, v), attn.heads)
        else:
            previous = [
                start + max(f - 1, 0)
                for start in range(0, len(k), self.frames)
                for f in range(self.frames)
            ]
            k, v = torch.cat([k[previous], k], 1), torch.cat([v[previous], v], 1)
            out = attend(q, k, v, attn.heads, self.how)
        return attn.to_out[1](attn.to_out[0](out))


class Reference(frame_by_frame.Reference):
    """`invert` keeps the latents and the maps of all steps, which `sample` then reads.

    Attributes:
        path: latents of each step of the inversion, from the clip to noise.
        masks: bool [F, h, w] of each step of the sampling.
    """

    def __init__(self, pipe, attention: str):
        super().__init__(pipe, attention)
        if (self.settings.mask, self.settings.background) != ("words", "inverted"):
            raise ValueError("the ablations of blended diffusion have no reference")

    def build(self, config, attention):
        """diffusers' UNet, all of its layers under one processor."""
        unet = UNet2DConditionModel.from_config(config)
        self.processor = Processor(attention)
        unet.set_attn_processor(self.processor)
        return unet

    def predict(self, latents, t, text):
        """The maps are those of this call alone, for all texts."""
        self.processor.frames, self.processor.maps = len(latents), []
        return super().predict(latents, t, text)

    @torch.no_grad()
    def invert(self, latents: Tensor, prompt: str, steps: int) -> Tensor:
        """DDIM inversion told what the clip shows."""
        self.source, self.path, self.stored = prompt, [latents], []
        return super().invert(latents, prompt, steps)

    def next_step(self, noise, t, latents):
        """Eq. 4; what it saw and where it led are stored."""
        self.stored.append(self.stored_maps(latents))
        self.path.append(super().next_step(noise, t, latents))
        return self.path[-1]

    @torch.no_grad()
    def sample(
        self, latents: Tensor, prompt: str, steps: int, guidance: float, *,
        words: list[tuple[str, str]] | None = None,
    ) -> Tensor:  # fmt: skip
        """DDIM under guidance, blended with the inversion outside the words' mask.

        Args:
            latents, prompt, steps, guidance: as for every method; as many steps as inverted.
            words: pairs of (word or phrase of the source prompt, that of `prompt`); by default
                the one in which they differ.
        """
        words = [changed(self.source, prompt)] if words is None else words
        old, self.new = (
            [self.places(text, pair[side]) for pair in words]
            for side, text in enumerate((self.source, prompt))
        )
        size = latents.shape[2:]
        self.before = [[self.look(maps, word, size) for word in old] for maps in self.stored]
        self.seen, self.masks = [], []
        return super().sample(latents, prompt, steps, guidance)

    def step(self, noise, t, latents):
        """Eq. 2, then eq. 3 with the union of both sides' masks, averaged over the steps T..t."""
        maps, size = self.stored_maps(latents), latents.shape[2:]
        self.seen.append([self.look(maps, word, size) for word in self.new])
        left = len(self.path) - 1 - len(self.seen)
        mask = torch.zeros(len(latents), *size, dtype=torch.bool, device=latents.device)
        for steps in (self.before[left:], self.seen):
            for word in zip(*steps, strict=True):
                mask |= sum(word) / len(word) > self.settings.threshold
        self.masks.append(mask)
        return torch.where(mask[:, None], super().step(noise, t, latents), self.path[left])

    def stored_maps(self, latents: Tensor) -> list[Tensor]:
        """The last call's maps [F, heads, tokens, L] that are looked at, under its last text."""
        sizes = {h * w for h, w in self.grids(latents.shape[2:])}
        return [m[-len(latents) :] for m in self.processor.maps if m.shape[2] in sizes]

    def grids(self, size) -> list[tuple[int, int]]:
        """(h, w) of the levels that are looked at."""
        return [tuple(-(-n // 2**level) for n in size) for level in self.settings.levels]

    def look(self, maps: list[Tensor], tokens: list[int], size) -> Tensor:
        """Where a word is looked at, [F, h, w] in units of each frame's maximum."""
        layers, grids = [], self.grids(size)
        for layer in maps:
            (grid,) = [g for g in grids if g[0] * g[1] == layer.shape[2]]
            mean = layer[..., tokens].mean((1, 3))
            layers.append(resize(mean.unflatten(1, grid), grids[0]))
        seen = resize(sum(layers) / len(layers), size)
        if self.settings.floor == "mean":
            seen = seen - seen.mean((1, 2), keepdim=True)
        return seen / seen.amax((1, 2), keepdim=True)

    def places(self, prompt: str, word: str) -> list[int]:
        """Positions of a word's tokens in a prompt, and of those behind that count as its own."""
        ids = self.tokenizer(prompt).input_ids
        wanted = self.tokenizer(word, add_special_tokens=False).input_ids
        found = set()
        for start in range(len(ids) - len(wanted) + 1):
            if ids[start : start + len(wanted)] == wanted:
                end = min(start + len(wanted) + self.settings.after, len(ids))
                found |= {*range(start, end)}
        return sorted(found)


def changed(source: str, prompt: str) -> tuple[str, str]:
    """The words between those that two prompts begin with and end with alike."""
    old, new = source.split(), prompt.split()
    while old and new and old[0] == new[0]:
        old, new = old[1:], new[1:]
    while old and new and old[-1] == new[-1]:
        old, new = old[:-1], new[:-1]
    return " ".join(old), " ".join(new)


def resize(maps: Tensor, size) -> Tensor:
    """Bilinear, [n, h, w]."""
    return F.interpolate(maps[:, None], size=tuple(size), mode="bilinear")[:, 0]
