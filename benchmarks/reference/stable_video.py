"""StableVideo's diffusion core: key frames edited as pictures, each carried into the next.

`invert` and `sample` take pictures, one or several, as Stable Diffusion does; `edit_keys` is
section 3.2 with plain atlas ops, the lookup by grid_sample and its adjoint by a loop over corners.
Without ControlNets, so that the noise of eq. 6 is a picture's own inversion, as in ours. Left out:
the atlas's training, the choice of key frames, the aggregation network (eq. 7), the background;
an object so small in the key frame before that its pixels leave texels between them.
"""

from __future__ import annotations

from copy import deepcopy
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from tvkernels.benchmarks.reference import frame_by_frame


class Reference(frame_by_frame.Reference):
    """The stock UNet and VAE."""

    def __init__(self, pipe, attention: str):
        super().__init__(pipe, attention)
        self.vae = deepcopy(pipe.vae)

    @torch.no_grad()
    def edit(
        self, picture: Tensor, prompt: str, steps: int, guidance: float, strength: float,
        alpha: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Noises a picture [3, H, W] in [0, 1] to t0 and denoises it under a prompt (eq. 6).

        Args:
            picture, prompt, steps, guidance: as they are called.
            strength: t0.
            alpha: [H * W] of the layer; elsewhere the latents are held to the picture's own.
        """
        scale = self.vae.config.scaling_factor
        pixels = picture[None].to(self.vae.dtype) * 2 - 1
        clean = self.vae.encode(pixels).latent_dist.mode() * scale
        mask = None
        if alpha is not None:
            inside = F.adaptive_max_pool2d(alpha.view(1, 1, *picture.shape[1:]), clean.shape[2:])
            mask = F.max_pool2d(inside, 3, 1, 1) > 0.5
        levels = self.levels(clean, steps, max(1, min(steps, round(steps * strength))))
        latents = self.denoise(levels, prompt, steps, guidance, mask)
        pixels = self.vae.decode(latents / scale).sample[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def levels(self, latents: Tensor, steps: int, count: int) -> list[Tensor]:
        """A latent [1, 4, h, w] and what the first `count` steps of its inversion make of it."""
        self.scheduler.set_timesteps(steps, device=self.device)
        text, found = self.encode(self.settings.inversion_prompt), [latents]
        for t in reversed(self.scheduler.timesteps[-count:]):
            noise = self.predict(found[-1], t, text)[0]
            found.append(self.next_step(noise, t, found[-1]))
        return found

    @torch.no_grad()
    def denoise(
        self, levels: list[Tensor], prompt: str, steps: int, guidance: float, mask: Tensor | None
    ) -> Tensor:
        """Back from the last of `levels`, held to the others outside of a mask [1, 1, h, w]."""
        self.scheduler.set_timesteps(steps, device=self.device)
        *levels, latents = levels
        text = torch.cat([self.encode(""), self.encode(prompt)])
        for t in self.scheduler.timesteps[-len(levels) :]:
            low, high = self.predict(latents, t, text)
            latents = self.step(low + guidance * (high - low), t, latents)
            if mask is not None:
                latents = torch.where(mask, latents, levels.pop())
        return latents

    def edit_keys(
        self, pixels: Tensor, uv: Tensor, alpha: Tensor, size: tuple[int, int], prompt: str,
        steps: int, guidance: float,
    ) -> tuple[list[Tensor], Tensor]:  # fmt: skip
        """A foreground's key frames, one after the other (eq. 5 and 6), and their median atlas.

        Args:
            pixels, uv, alpha: [K, 3, H, W], [K, H * W, 2] and [K, H * W] of the key frames.
            size: of the layer's atlas.
            prompt, steps, guidance: of each edit.
        Returns:
            K edits [3, H, W], and [H, W, 3] of the atlas, 0 where none shows a texel.
        """
        edits, partial = [], []
        for own, place, opacity in zip(pixels, uv, alpha, strict=True):
            start, strength = own, self.settings.first
            if partial:
                start, strength = carry(own, place, opacity, partial[-1]), self.settings.strength
            edits.append(self.edit(start, prompt, steps, guidance, strength, opacity))
            partial.append(splat(edits[-1].flatten(1).T, place, opacity, size))
        stack = torch.stack(partial)
        seen = torch.where(stack[..., 3:] > 0, stack[..., :3], float("nan"))
        return edits, seen.nanmedian(0).values.nan_to_num(0)


def lookup(atlas: Tensor, uv: Tensor) -> Tensor:
    """[H, W, C] at [P, 2] in [-1, 1] -> [P, C]."""
    images = atlas.permute(2, 0, 1)[None]
    shown = F.grid_sample(images, uv[None, None], padding_mode="border", align_corners=False)
    return shown[0, :, 0].T


def splat(values: Tensor, uv: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
    """[P, C] at [P, 2], weighted by [P] -> [H, W, C + 1]: means, and behind them the weights."""
    sides = uv.new_tensor(size[::-1])
    place = (((uv + 1) * sides - 1) / 2).clamp(min=uv.new_zeros(2), max=sides - 1)
    low = place.floor()
    total = values.new_zeros(size[0] * size[1], values.shape[1] + 1)
    for corner in product((0, 1), repeat=2):
        texel = low + uv.new_tensor(corner)
        share = (1 - (place - texel).abs()).prod(1) * weight
        column, row = torch.minimum(texel, sides - 1).long().unbind(1)
        carried = torch.cat([values * share[:, None], share[:, None]], 1)
        total.index_add_(0, row * size[1] + column, carried)
    cover = total[:, -1:]
    means = total[:, :-1] / torch.where(cover > 0, cover, 1)
    return torch.cat([means, cover], 1).unflatten(0, size)


def carry(own: Tensor, uv: Tensor, alpha: Tensor, partial: Tensor) -> Tensor:
    """A picture [3, H, W] with the edit before over it, as far as that shows the layer (eq. 5)."""
    marked = torch.cat([partial[..., :3], (partial[..., 3:] > 0).to(partial)], 2)
    shown = lookup(marked, uv)
    seen = ((shown[:, 3] > 0.999) * alpha)[:, None]
    mixed = seen * shown[:, :3] + (1 - seen) * own.flatten(1).T
    return mixed.T.unflatten(1, own.shape[1:])
