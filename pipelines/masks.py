"""Where an edit may change a clip: masks made from attention (BLD-AC, eq. 5), or the user's."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from tvkernels.processors.maps import resize_maps

FLOORS = ("zero", "mean")


class WordMask:
    """The mask of each step: where words' maps, averaged over the steps T..t, are high.

    Each step's map counts in its own units before it is averaged, which eq. 5 leaves open: a step
    in which the words are looked at everywhere weighs as much as one that has found the object.
    Sampling comes down from T, so that the means of the inversion's and of the sampling's maps are
    running ones: the inversion's, made going up, are taken from their end.

    Args:
        size: (h, w) of the latents.
        old, new: each word's positions in the source prompt and in the edit's.
        threshold: tau; a map's unit is its maximum in the frame, above its floor.
        floor: "zero", or the map's "mean" in the frame.
    """

    def __init__(
        self,
        size: tuple[int, int],
        old: list[list[int]],
        new: list[list[int]],
        threshold: float = 0.3,
        floor: str = "zero",
    ):
        self.size, self.old, self.new = tuple(size), old, new
        self.threshold, self.floor = threshold, floor
        self.total, self.steps = 0.0, 0

    @property
    def tokens(self) -> list[int]:
        """The new words' positions, one after the other: those that `seen` is of."""
        return [*chain(*self.new)]

    def __call__(self, kept: Tensor, seen: Tensor) -> Tensor:
        """This step's mask, the union over all words: bool [F, 1, h, w].

        Args:
            kept: [T, F, h', w'], the inversion's maps of every token of the source prompt.
            seen: the sampling's maps of `tokens`.
        """
        maps = [kept[word].mean(0) for word in self.old]
        maps += [part.mean(0) for part in seen.split([len(word) for word in self.new])]
        maps = resize_maps(torch.stack(maps), self.size)
        if self.floor == "mean":
            maps = maps - maps.mean((-2, -1), keepdim=True)
        peak = maps.amax((-2, -1), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
        self.total, self.steps = self.total + maps / peak, self.steps + 1
        return (self.total / self.steps > self.threshold).any(0)[:, None]


@dataclass(frozen=True)
class GivenMask:
    """The same mask in every step, bool [F, 1, h, w]; it needs no maps."""

    mask: Tensor
    tokens = None

    def __call__(self, kept=None, seen=None) -> Tensor:
        """The mask."""
        return self.mask


def latent_mask(mask, frames: int, size: tuple[int, int], multiple: int) -> Tensor:
    """A mask of pixels as one of latents, of which any is marked that holds a marked pixel.

    Args:
        mask: bool or number [F, H, W], or [H, W] for all frames; above zero is marked.
        frames, size: of the clip's latents, (h, w).
        multiple: pixels to a latent.
    Returns:
        bool [F, 1, h, w].
    Raises:
        ValueError: a mask of another size.
    """
    mask = torch.as_tensor(mask)
    wanted = (frames, *(side * multiple for side in size))
    if mask.shape not in (wanted, wanted[1:]):
        raise ValueError(
            f"a mask of {list(mask.shape)} for a clip of {list(wanted)}: give one of the clip's "
            "frames, height and width, or a single one of its height and width"
        )
    pixels = (mask > 0).float().expand(wanted)
    return F.max_pool2d(pixels[:, None], multiple) > 0
