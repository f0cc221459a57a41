"""`accelerate`: a backend chosen by name, prepared for the shapes that come."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tvkernels._dispatch import BackendError
from tvkernels._inflate import STALE_TIME, InflatedHandle
from tvkernels._ranges import watch
from tvkernels.patterns import FrameTable
from tvkernels.processors.maps import LEVELS
from tvkernels.processors.touched import Guests
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
    reasons = why_not(backend, handle.model.device.type, handle.model.dtype)
    if reasons:
        raise BackendError("\n".join([f"the runtime {backend} cannot run here", *reasons]))
    return Runner(handle, backend, options)


def why_not(backend: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[str]:
    """Every reason against a backend for a UNet of that dtype on that kind of device; empty if it
    runs.

    Raises:
        ValueError: unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown runtime {backend!r}: use one of {', '.join(BACKENDS)}")
    module = _module(backend)
    reasons = module.why_not(device)
    if dtype not in module.DTYPES:
        names = ", ".join(str(own).removeprefix("torch.") for own in module.DTYPES)
        reasons.append(f"the UNet computes in {dtype}, it takes {names}".replace("torch.", ""))
    return reasons


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
        self._weights: tuple = ()  # those of the last call
        self._epoch = 0  # writes that leave no trace on a weight
        self._made_at: tuple | None = None  # the state that text was last projected in
        watch(handle.model)

    def __reduce__(self):
        """Copied and pickled without what was prepared, which is prepared anew."""
        return Runner, (self.handle, self.backend, dict(self.options))

    @property
    def config(self):
        """The UNet's configuration."""
        return self.handle.model.config

    @property
    def dtype(self) -> torch.dtype:
        """The UNet's dtype."""
        return self.handle.model.dtype

    def text(self, states: Tensor) -> Tensor:
        """[B, L, C] text states as steps take them: projected where the UNet allows it.

        What was projected follows the weights: after another adapter, or under another scale, the
        next call projects it again, in place.
        """
        found = self.handle.check()
        if not self.handle.holds_text(found):
            return states
        projected = self.handle.project_text(states)
        self._made_at = self._state(found)
        projected._made = (states, self._made_at)
        return projected

    def times(self, timesteps: Tensor) -> Sequence[Tensor]:
        """[S] timesteps as steps take them, one each: projected rows where the UNet has them.

        A row knows its timestep, which the UNet is called with too.
        """
        found = self.handle.check()
        if not self.handle.holds_time(found):
            return timesteps.unbind()
        rows, state = self.handle.project_time(timesteps, found).split(1), self._state(found)
        for row, timestep in zip(rows, timesteps, strict=True):
            row._made = (timestep, state)
        return rows

    def weights_changed(self) -> None:
        """To be called where weights were written past autograd; other changes are noticed."""
        if not self._module.LIVE:
            self._steps.clear()
        self._epoch += 1
        self.handle.weights_changed()

    def _state(self, found: Guests, scale: float = 1.0) -> tuple:
        return *found.weights, self._epoch, scale

    def _current(self, text: Tensor, timestep: Tensor, found: Guests, scale: float) -> tuple:
        """Text and timestep as the weights of now have them, and the timestep as a number."""
        state = self._state(found, scale)
        whole = text if text._base is None else text._base
        held = text.shape[-1] == self.handle.text_width
        # A copy of what was projected has lost its mark, and is as old as the last one at least.
        states, before = getattr(whole, "_made", (None, (held and self._made_at) or state))
        if before != state or (held and not self.handle.text_untouched()):
            fixed = whole.is_inference() and not torch.is_inference_mode_enabled()
            if states is None or fixed or not self.handle.holds_text(found):
                raise ValueError("text was projected before the UNet changed: call text() again")
            whole.copy_(self._scaled(scale, self.handle.project_text, states))
            whole._made = (states, state)
        if timestep.dim() != 2:
            return text, timestep.reshape(()), None
        number, before = getattr(timestep, "_made", (None, state))
        if not self.handle.holds_time(found):
            if number is None:
                raise ValueError(STALE_TIME)
            return text, number.to(text.device), None
        if before != state:
            timestep = self._scaled(scale, self.handle.project_time, number[None])
        return text, timestep, number

    def _scaled(self, scale: float, project: Callable, given: Tensor) -> Tensor:
        """A projection with adapters as strong as diffusers makes them for a call."""
        if scale == 1:
            return project(given)
        from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers

        scale_lora_layers(self.handle.model, scale)
        try:
            return project(given)
        finally:
            unscale_lora_layers(self.handle.model, scale)

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
            cross_attention_kwargs: {"num_frames": F}, which for whole clips the batch of the text
                tells already, and {"scale": s} of LoRA, as diffusers has it; other than 1 eager
                alone.
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
        named = dict(cross_attention_kwargs or {})
        clips, images = encoder_hidden_states.shape[0], sample.shape[0]
        frames = named.pop("num_frames", images // max(clips, 1))
        scale = named.pop("scale", None)
        scale = 1.0 if scale is None else scale
        if named or (scale != 1 and self.backend != "eager"):
            what = sorted(named) or ["scale"]
            raise ValueError(
                f"the runtime {self.backend} cannot honour cross_attention_kwargs {what}"
            )
        if images not in (clips * frames, frames):
            raise ValueError(
                f"{images} images are not {clips} clips of {frames} frames: text is [B, L, C] for "
                "a batch of [B * F, ...]"
            )
        if tokens is not None and (self.backend not in MAPPING or return_dict):
            raise ValueError(
                f"the runtime {self.backend} gives no maps of words: use {' or '.join(MAPPING)}, "
                "with return_dict=False"
            )
        if tables is not None and not self._module.LIVE:
            raise ValueError(f"the runtime {self.backend} has its pattern in the program")
        found = self.handle.check()
        if found.moved and self.backend != "eager":
            raise ValueError(
                f"the runtime {self.backend} takes all weights at once, and this UNet's are "
                "offloaded layer by layer: use eager, or enable_model_cpu_offload()"
            )
        if not isinstance(timestep, Tensor):
            timestep = torch.as_tensor(timestep, device=sample.device)
        text, timestep, number = self._current(encoder_hidden_states, timestep, found, scale)
        text, timestep = text.to(sample.dtype), timestep.to(sample.device)
        if self._weights != found.weights:
            if not self._module.LIVE:
                self._steps.clear()
            self.handle.settle()  # compiled code and graphs read what it works out
            self._weights = found.weights
        if self._module.LIVE:
            step = self._step(sample, timestep, text, frames)
            given = {
                "tables": tables, "tokens": tokens, "scale": None if scale == 1 else scale,
                "number": None if number is None else number.to(sample.device),
            }  # fmt: skip
            given |= {} if tokens is None else {"levels": levels}
            given = {name: value for name, value in given.items() if value is not None}
            out = step(sample.unflatten(0, (images // frames, frames)), timestep, text, **given)
            if tokens is not None:
                return out
            noise = out
        else:
            if images != clips * frames:
                sample = sample.repeat(clips, 1, 1, 1)
            if not mixes_frames(self.handle):
                # Exported with every frame a clip of its own: the text is repeated for each.
                text, frames = text.repeat_interleave(frames, 0), 1
            noise = self._step(sample, timestep, text, frames)(sample, timestep, text)
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
