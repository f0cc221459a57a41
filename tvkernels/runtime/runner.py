"""`accelerate`: a backend chosen by name, prepared for the shapes that come."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tvkernels._dispatch import BackendError
from tvkernels._inflate import InflatedHandle
from tvkernels._ranges import watch
from tvkernels.patterns import FrameTable
from tvkernels.processors.maps import LEVELS
from tvkernels.runtime.program import mixes_frames, shape_of

# Each is a module beside this one. There is no "auto": what is fastest depends on how often the
# prepared form is used, which only the caller knows.
BACKENDS = ("eager", "compile", "cuda_graph", "onnx", "tensorrt", "aoti")
# Those whose steps give words' maps too: a captured graph and a file have one output.
MAPPING = ("eager", "compile")

Step = Callable[..., Tensor]


def accelerate(unet: nn.Module, backend: str = "eager", **options) -> Runner:
    """An inflated UNet under a runtime, called as diffusers calls a UNet.

    Nothing is prepared before the first call, which alone knows the shapes.

    Args:
        unet: inflated by `tvkernels.inflate` (the plain 2-D UNet by `recipes.FRAME_BY_FRAME`).
        backend: one of `BACKENDS`.
        options: the backend's own, see its file.
    Raises:
        ValueError: unknown backend or options, or a UNet that is not inflated.
        BackendError: the backend cannot run here; the text lists every reason.
    """
    handle = getattr(getattr(unet, "_orig_mod", unet), "_tvkernels_handle", None)
    if not isinstance(handle, InflatedHandle):
        raise ValueError(
            f"this {type(unet).__name__} is not inflated: call tvkernels.inflate(unet, recipe) "
            "first, with recipes.FRAME_BY_FRAME for the plain 2-D UNet"
        )
    reasons = why_not(backend, handle.model.device.type)
    if reasons:
        raise BackendError("\n".join([f"the runtime {backend} cannot run here", *reasons]))
    return Runner(handle, backend, options)


def why_not(backend: str, device: str = "cpu") -> list[str]:
    """Every reason against a backend for a UNet on that kind of device; empty if it runs.

    Raises:
        ValueError: unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown runtime {backend!r}: use one of {', '.join(BACKENDS)}")
    return _module(backend).why_not(device)


def _module(backend: str):
    return importlib.import_module(f"tvkernels.runtime.{backend}")


class Runner:
    """A UNet's call, run by one backend; a step is prepared once for each shape.

    Args:
        handle: of the inflated UNet.
        backend: one of `BACKENDS`.
        options: the backend's own.
    """

    def __init__(self, handle: InflatedHandle, backend: str, options: dict):
        self.handle, self.backend, self.options = handle, backend, options
        self._module = _module(backend)
        unknown = set(options) - set(self._module.OPTIONS)
        if unknown:
            known = ", ".join(self._module.OPTIONS) or "none"
            raise ValueError(
                f"the runtime {backend} has no option {sorted(unknown)[0]!r}: it takes {known}"
            )
        self._steps: dict[tuple, Step] = {}
        watch(handle.model)

    def __deepcopy__(self, memo):
        """Of the copied UNet; what was prepared is prepared anew, and a module is no copy."""
        return Runner(copy.deepcopy(self.handle, memo), self.backend, dict(self.options))

    @property
    def config(self):
        """The UNet's configuration."""
        return self.handle.model.config

    @property
    def dtype(self) -> torch.dtype:
        """The UNet's dtype."""
        return self.handle.model.dtype

    def text(self, states: Tensor) -> Tensor:
        """[B, L, C] text states as steps take them: projected where the UNet allows it."""
        return states if self.handle.text_width is None else self.handle.project_text(states)

    def times(self, timesteps: Tensor) -> Sequence[Tensor]:
        """[S] timesteps as steps take them, one each: projected rows where the UNet has them."""
        if self.handle.time_width is None:
            return timesteps.unbind()
        return self.handle.project_time(timesteps).split(1)

    def weights_changed(self) -> None:
        """To be called after tuning or loading: drops what holds the weights of before."""
        if not self._module.LIVE:
            self._steps.clear()
        self.handle.settle()

    @torch.no_grad()
    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        *,
        cross_attention_kwargs: dict | None = None,
        tables: Sequence[FrameTable] | None = None,
        tokens: Tensor | None = None,
        levels: Sequence[int] = LEVELS,
        return_dict: bool = True,
    ):
        """The noise in `sample`, in diffusers' form.

        Args:
            sample: [B * F, 4, h, w]; or [F, 4, h, w], one clip under every text, where
                `cross_attention_kwargs` tells F.
            timestep: a number, or one of `times`.
            encoder_hidden_states: [B, L, C], or [B, L, P] of `text`.
            cross_attention_kwargs: nothing but {"num_frames": F}, which for whole clips the batch
                of the text tells already.
            tables: compiled patterns in place of the recipe's, `Handle.tables`; eager, compile
                and cuda_graph alone.
            tokens: int64 [T], positions in the text whose maps are asked for too; `MAPPING` alone,
                and without `return_dict`.
            levels: the layers that are looked at, see `processors.maps.TokenMaps`.
            return_dict: an object with `sample`, else a tuple of the noise and what `tokens` asked
                for: maps [T, F, h', w'] of the last clip, `processors.maps.TokenMaps.mean`.
        Raises:
            ValueError: the batch does not hold whole clips, or an argument that this backend
                cannot honour.
        """
        clips, images = encoder_hidden_states.shape[0], sample.shape[0]
        frames = (cross_attention_kwargs or {}).get("num_frames", images // max(clips, 1))
        strange = set(cross_attention_kwargs or {}) - {"num_frames"}
        if strange:
            raise ValueError(f"a runtime cannot honour cross_attention_kwargs {sorted(strange)}")
        if images not in (clips * frames, frames):
            raise ValueError(
                f"{images} images are not {clips} clips of {frames} frames: text is [B, L, C] for "
                "a batch of [B * F, ...]"
            )
        if images != clips * frames and not self._module.LIVE:
            sample = sample.repeat(clips, 1, 1, 1)
        timestep = torch.as_tensor(timestep, device=sample.device)
        timestep = timestep if timestep.dim() == 2 else timestep.reshape(())
        text = encoder_hidden_states.to(sample.dtype)
        if not self._module.LIVE and not mixes_frames(self.handle):
            # Exported with every frame a clip of its own: the text is repeated for each.
            text, frames = text.repeat_interleave(frames, 0), 1
        if tokens is not None and (self.backend not in MAPPING or return_dict):
            raise ValueError(
                f"the runtime {self.backend} gives no maps of words: use {' or '.join(MAPPING)}, "
                "with return_dict=False"
            )
        step = self._step(sample, timestep, text, frames)
        if self._module.LIVE:
            sample = sample.unflatten(0, (images // frames, frames))
        if tokens is not None:
            return step(sample, timestep, text, tables, tokens, levels)
        if tables is None:
            noise = step(sample, timestep, text)
        elif self._module.LIVE:
            noise = step(sample, timestep, text, tables)
        else:
            raise ValueError(f"the runtime {self.backend} has its pattern in the program")
        if not return_dict:
            return (noise,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=noise)

    def _step(self, sample: Tensor, timestep: Tensor, text: Tensor, frames: int) -> Step:
        shape = shape_of(
            self.handle, frames, tuple(sample.shape[2:]), text.shape[1],
            projected=text.shape[-1] == self.handle.text_width,
        )  # fmt: skip
        time = timestep.shape[-1] if timestep.dim() == 2 else None
        shape = replace(shape, time=time, clips=text.shape[0])
        key = (self._module.serves(shape), sample.device, sample.dtype)
        if key not in self._steps:
            self.handle.settle()
            self._steps[key] = self._module.prepare(self.handle, shape, **self.options)
        return self._steps[key]
