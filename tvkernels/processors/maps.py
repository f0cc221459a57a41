"""Where the frames look at chosen words: maps that one call of a UNet gives beside its result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Cross-attention at 1/2 and 1/4 of the latents' size. BLD-AC does not name its layers; these are
# those with more than a blur to show and a word's worth of meaning.
LEVELS = (1, 2)


class TokenMaps:
    """Asks one call of an inflated UNet for maps and takes them in.

    ``unet(..., cross_attention_kwargs={"num_frames": F, "maps": maps})`` fills it; a step of
    `tvkernels.runtime` makes it inside and returns `mean()`. The maps are those of the batch's
    last clip: the conditional half under guidance. No layer's whole map is ever held.

    Args:
        tokens: int64 [T], positions in the text.
        levels: the layers to be seen, at 1 / 2**level of the latents' size.
    """

    def __init__(self, tokens: Tensor, levels: Sequence[int] = LEVELS):
        self.tokens, self.levels = tokens, tuple(levels)
        self.found: list[Tensor] = []

    def wants(self, grid: tuple[int, int] | None, size: tuple[int, int]) -> bool:
        """Whether a layer with that token grid is seen, for latents of `size`."""
        h, w = size
        return grid in [(-(-h // 2**level), -(-w // 2**level)) for level in self.levels]

    def add(self, maps: Tensor, grid: tuple[int, int]) -> None:
        """Takes a layer's maps [B, F, N, T], means over its heads, of B clips."""
        self.found.append(maps[-1].unflatten(1, grid).movedim(-1, 0))

    def mean(self) -> Tensor:
        """The mean over layers [T, F, h', w'], brought to the finest of their grids (bilinear).

        In float32 where the UNet is narrower.

        Raises:
            ValueError: no layer was of a size that is looked at.
        """
        if not self.found:
            sizes = ", ".join(f"1/{2**level}" for level in self.levels)
            raise ValueError(f"this UNet has no cross-attention at {sizes} of the latents' size")
        finest = tuple(max(maps.shape[i] for maps in self.found) for i in (-2, -1))
        wide = torch.promote_types(self.found[0].dtype, torch.float32)
        maps = [resize_maps(maps.to(wide), finest) for maps in self.found]
        return torch.stack(maps).mean(0)


def resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """[T, F, h, w] -> [T, F, *size], bilinear."""
    if maps.shape[-2:] == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
