"""How a batch of images is a clip: the frame count and picture size of the call under way."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Clip:
    """Shared by all patched layers of one model; the model's pre-hook fills in each call.

    Frames lie in the batch, guidance-major: [B * F, ...] with all frames of one sample together.
    Gradient checkpointing reads it again in the backward pass, which therefore comes before the
    next call with other frames or another size.

    Args:
        num_frames: frames per clip for every call; None takes the call's own word, else the batch.
        call_frames: frames per clip of the call under way.
        size: (h, w) of the call's latents, from which each layer's token grid follows.
        images: frames of all clips of the call.
        one_time: whether all images of the call under way are at one timestep.
        one_clip: whether all clips of the call under way are the same, under other texts.
    """

    num_frames: int | None = None
    call_frames: int | None = None
    size: tuple[int, int] | None = None
    images: int | None = None
    one_time: bool = False
    one_clip: bool = False

    def frames(self, batch: int, num_frames: int | None = None) -> int:
        """Frames per clip in a batch.

        Raises:
            ValueError: the frames do not divide the batch.
        """
        told = (num_frames, self.call_frames, self.num_frames)
        frames = next((n for n in told if n is not None), batch)
        if frames < 1 or batch % frames:
            raise ValueError(
                f"a batch of {batch} images does not hold whole clips of {frames} frames: "
                "the batch is [B * F, ...], guidance halves first"
            )
        return frames

    def split(self, x: Tensor, num_frames: int | None = None) -> Tensor:
        """[B * F, ...] as [B, F, ...]."""
        frames = self.frames(x.shape[0], num_frames) if x.shape[0] else 1
        # Written out, for in an exported graph -1 would make the frame count a symbol too.
        return x.unflatten(0, (x.shape[0] // frames, frames))

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """(h, w) of a layer with that many tokens: the latents' size halved, rounding up."""
        h, w = self.size or (0, 0)
        while h * w > tokens and h * w > 1:
            h, w = -(-h // 2), -(-w // 2)
        return (h, w) if h * w == tokens else None


@dataclass(frozen=True)
class Span:
    """A layer's part of a row that holds what several layers need, one after the other.

    Args:
        start, width: the part.
        total: width of the whole row, by which it is told from what is not projected yet.
    """

    start: int
    width: int
    total: int

    def read(self, row: Tensor) -> Tensor:
        """[..., total] -> [..., width], a view."""
        return row.narrow(-1, self.start, self.width)
