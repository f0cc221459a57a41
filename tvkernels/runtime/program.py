"""A video UNet as a program of tensors alone: what every exported form is made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tvkernels._dispatch import OPS
from tvkernels._inflate import InflatedHandle
from tvkernels.patterns import FramePattern, FrameTable
from tvkernels.processors.maps import LEVELS, TokenMaps

INPUTS = ("sample", "timestep", "encoder_hidden_states")
OUTPUT = "out_sample"
EXAMPLE_CLIPS = 2  # guidance's; a size of 1 would be taken for a constant
# diffusers copies what it upsamples from a batch of 64 images on: another program.
MOST_IMAGES = 63


class VideoStep(nn.Module):
    """The UNet's noise prediction for whole clips, tensors in, one tensor out.

    Args:
        unet: an inflated UNet.
        frames: frames per clip, a constant of the program; None where samples are [B, F, ...].
        tables: compiled patterns for calls that bring none; None takes the recipe's own.
    """

    def __init__(
        self,
        unet: nn.Module,
        frames: int | None = None,
        tables: Sequence[FrameTable] | None = None,
    ):
        super().__init__()
        self.unet, self.frames = unet, frames
        # Buffers, so that an exported program knows them by name.
        self._patterns = None if tables is None else len(tables)
        for i, table in enumerate(tables or ()):
            for field, tensor in table._asdict().items():
                self.register_buffer(f"pattern{i}_{field}", tensor, persistent=False)

    @property
    def tables(self) -> Sequence[FrameTable] | None:
        """Those given at the start."""
        if self._patterns is None:
            return None
        buffers = [
            {field: getattr(self, f"pattern{i}_{field}") for field in FrameTable._fields}
            for i in range(self._patterns)
        ]
        return tuple(FrameTable(**fields) for fields in buffers)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        tables: Sequence[FrameTable] | None = None,
        tokens: Tensor | None = None,
        levels: Sequence[int] = LEVELS,
        number: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The noise [B * F, 4, h, w]; with `tokens` also their maps, see `TokenMaps.mean`.

        Args:
            sample: [B * F, 4, h, w], all frames of a clip together, or [B, F, 4, h, w]; or
                [1, F, 4, h, w], one clip under B texts.
            timestep: [], or a row [1, T] of `InflatedHandle.project_time`.
            encoder_hidden_states: [B, L, C] text states, or [B, L, P] of
                `InflatedHandle.project_text`.
            tables: compiled patterns, `Handle.tables`.
            tokens, levels: of `TokenMaps`.
            number: [], the timestep that a row stands for: hooks and wrappers of the UNet see it.
            scale: of LoRA, as in diffusers.
        """
        # Sizes are never divided: products alone stay simple where they are symbols.
        one_clip = False
        if self.frames is None:
            frames, clips = sample.shape[1], encoder_hidden_states.shape[0]
            one_clip = sample.shape[0] != clips
            sample = sample.expand(clips, *sample.shape[1:]).flatten(0, 1)
        else:
            frames = self.frames
            sample = sample.reshape(encoder_hidden_states.shape[0] * frames, *sample.shape[1:])
        known = timestep.dim() == 2
        maps = None if tokens is None else TokenMaps(tokens, levels)
        if known and number is None:
            number = timestep.new_zeros(())
        named = {
            "num_frames": frames,
            "one_clip": one_clip,
            "checked": True,  # by the runner, for all runtimes
            "tables": self.tables if tables is None else tables,
            "maps": maps,
        }
        noise = self.unet(
            sample,
            number if known else timestep,
            encoder_hidden_states,
            timestep_cond=timestep if known else None,
            cross_attention_kwargs=named if scale is None else {**named, "scale": scale},
            return_dict=False,
        )[0]
        return noise if maps is None else (noise, maps.mean())


@dataclass(frozen=True)
class Shape:
    """What an exported program is made for.

    Args:
        frames: frames per clip; 1 where the recipe's frames do not read each other, so that any
            number of frames is a batch of clips of one.
        height, width: of the latents.
        channels: of the latents.
        text: tokens and width of the text states.
        time: width of the timestep's row, None where the timestep itself is given.
        clips: clips in a call, where the program has no say in it.
    """

    frames: int
    height: int
    width: int
    channels: int
    text: tuple[int, int]
    time: int | None = None
    clips: int = EXAMPLE_CLIPS

    def example(self, clips: int, dtype: torch.dtype, device="cpu", seed: int = 0) -> tuple:
        """Random inputs (sample, timestep, encoder_hidden_states) for a number of clips."""
        draw = torch.Generator().manual_seed(seed)
        sample = torch.randn(
            clips * self.frames, self.channels, self.height, self.width, generator=draw
        )
        text = torch.randn(clips, *self.text, generator=draw)
        if self.time is None:
            time = torch.tensor(501, dtype=torch.int64)
        else:
            time = torch.randn(1, self.time, generator=draw).to(dtype)
        return sample.to(device, dtype), time.to(device), text.to(device, dtype)


def mixes_frames(handle: InflatedHandle) -> bool:
    """Whether a frame's result depends on other frames of its clip."""
    recipe = handle.recipe
    own = recipe.pattern == FramePattern.own()
    added = recipe.temporal is not None or recipe.temporal_unet is not None
    return not own or added or recipe.clip_group_norm


def shape_of(
    handle: InflatedHandle, frames: int, size: tuple[int, int], tokens: int = 77, *,
    projected: bool = False,
) -> Shape:  # fmt: skip
    """The program's shape for clips of `frames` frames and latents of `size` (h, w).

    Args:
        tokens: of the text.
        projected: text comes from `handle.project_text`, time from `handle.project_time`, where
            this UNet has them.
    Raises:
        ValueError: no frames.
    """
    config = handle.model.config
    if frames < 1:
        raise ValueError(f"a clip has one frame or more, not {frames}")
    width = handle.text_width if projected else config.cross_attention_dim
    return Shape(frames if mixes_frames(handle) else 1, *size, config.in_channels, (tokens, width))


@torch.no_grad()
def export_program(
    handle: InflatedHandle,
    shape: Shape,
    *,
    dynamic_size: bool = False,
    dynamic_clips: bool = True,
    keep_ops: bool = False,
) -> torch.export.ExportedProgram:
    """The UNet as an ExportedProgram of torch's own operators, ours decomposed.

    Attention stays one `scaled_dot_product_attention` each.

    Args:
        handle: of the inflated UNet, whose weights the program holds by reference.
        shape: the shape of one call; the frame count is a constant of the program.
        dynamic_size: height and width may change, in multiples of the UNet's halvings.
        dynamic_clips: the number of clips may change, 1 included.
        keep_ops: our ops stay nodes of their own, for what can call them.
    Returns:
        The program with inputs `INPUTS`.
    Raises:
        ValueError: a size that the UNet's halvings do not divide: that is another program.
    """
    from torch.fx.experimental import _config as symbolic

    unet = handle.model
    multiple = 2 ** (len(unet.config.block_out_channels) - 1)
    if any(n < multiple or n % multiple for n in (shape.height, shape.width)):
        raise ValueError(
            f"latents of {shape.height} x {shape.width}: both sides must be multiples of "
            f"{multiple} to be exported"
        )
    handle.settle()
    example = shape.example(
        EXAMPLE_CLIPS if dynamic_clips else shape.clips, unet.dtype, unet.device
    )
    auto, fixed = torch.export.Dim.AUTO, torch.export.Dim.STATIC
    clips, sides = auto if dynamic_clips else fixed, auto if dynamic_size else fixed
    sizes = ({0: clips, 2: sides, 3: sides}, {}, {0: clips})
    # Oblivious: a size of 1 is not told from others, so that one program serves 1 and 2 clips.
    with symbolic.patch(backed_size_oblivious=True):
        tables = handle.tables(shape.frames, unet.device) if keep_ops else None
        step = VideoStep(unet, shape.frames, tables)
        program = torch.export.export(step, example, dynamic_shapes=sizes)
        return program if keep_ops else program.run_decompositions(decompositions())


def decompositions() -> dict:
    """Composed PyTorch for each of our ops, for `ExportedProgram.run_decompositions`."""

    def composed(name: str):
        forward = OPS[name].backend("cpu").forward
        return lambda *args: forward(*args[:-1])

    return {op.overload: composed(name) for name, op in OPS.items()}
