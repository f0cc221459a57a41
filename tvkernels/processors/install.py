"""Our processors put into a diffusers model and taken out again, nothing else touched."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tvkernels.patterns import FramePattern, FrameTable
from tvkernels.processors.attention import (
    AttnProcessor,
    FrameAttnProcessor,
    LibraryAttnProcessor,
    TemporalAttnProcessor,
)
from tvkernels.processors.clip import Clip
from tvkernels.processors.touched import Guests, guests, is_a

# What the tokens of a self-attention are is decided by the module around it, the nearest one.
POSITIONS = ("Transformer2DModel", "DualTransformer2DModel", "TransformerSpatioTemporalModel")
FRAMES = (
    "AnimateDiffTransformer3D", "TransformerTemporalModel", "TemporalBasicTransformerBlock",
    "I2VGenXLTransformerTemporalEncoder",
)  # fmt: skip
# [B, F, C, h, w], where other UNets with layers over frames take [B, C, F, h, w].
FRAMES_FIRST = ("UNetSpatioTemporalConditionModel",)
REPLACEABLE = ("AttnProcessor", "AttnProcessor2_0")
REMEDIES = {
    "FusedAttnProcessor2_0": "call unfuse_qkv_projections() first",
    "SlicedAttnProcessor": "call set_attention_slice(None) first",
    "XFormersAttnProcessor": "call disable_xformers_memory_efficient_attention() first",
}

OPTIONAL = ("tables", "maps")  # what a call need not tell our processors

Patterns = FramePattern | Mapping[str, FramePattern]


class Handle:
    """What was changed in a model, and the way back; a context manager that removes itself.

    Args:
        model: the model to patch.
        clip: frames and size of the call under way, shared by the patched layers.
    """

    def __init__(self, model: nn.Module, clip: Clip):
        self.model, self.clip = model, clip
        self.processors: dict[str, AttnProcessor] = {}
        self._layers: dict[str, nn.Module] = {}
        self._parameters = list(inspect.signature(type(model).forward).parameters)[1:]
        self._frame_axis = 1 if is_a(model, *FRAMES_FIRST) else 2
        # Partials of functions and methods of models alone: a closure cannot be pickled, and would
        # tie a deep copy of the model to it.
        self._undo: list[Callable[[], Any]] = []
        self._placed: list[tuple[nn.Module, str, Any, object]] = []
        model._tvkernels_handle = self
        self._undo.append(partial(delattr, model, "_tvkernels_handle"))
        hook = model.register_forward_pre_hook(self._enter, with_kwargs=True)
        self._undo.append(hook.remove)

    @property
    def layers(self) -> list[str]:
        """Names of the patched attention layers."""
        return list(self._layers)

    def tables(
        self, num_frames: int, device: torch.device | str | None = None
    ) -> tuple[FrameTable, ...]:
        """The model's patterns compiled for clips of `num_frames` frames.

        What ``cross_attention_kwargs={"num_frames": F, "tables": ...}`` takes: to a compiled model
        other tables, of other patterns or numbers of frames, are other tensors, not other code.
        """
        frame = [p for p in self.processors.values() if isinstance(p, FrameAttnProcessor)]
        patterns = {p.index: p.pattern for p in frame}
        return tuple(patterns[i].table(num_frames, device=device) for i in sorted(patterns))

    def set_processor(self, name: str, layer: nn.Module, processor: AttnProcessor) -> None:
        """Gives one attention layer our processor, to be taken back on removal."""
        self._undo.append(partial(layer.set_processor, layer.processor))
        layer.set_processor(processor)
        self._layers[name], self.processors[name] = layer, processor

    def remove(self) -> None:
        """Restores the model as it was found; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.model).__name__}, {len(self._layers)} layers)"

    def check(self) -> Guests:
        """What else sits on the model now.

        Raises:
            RuntimeError: something has replaced or removed what we placed.
        """
        self._check_processors()
        for module, where, key, thing in self._placed:
            if vars(module)[where].get(key) is not thing:
                what = key if where == "_modules" else "hook"
                raise RuntimeError(
                    f"something replaced or removed the {what} that tvkernels placed on a "
                    f"{type(module).__name__}: call handle.remove() first"
                )
        return guests(self.model)

    def _check_processors(self) -> None:
        for name, layer in self._layers.items():
            if layer.processor is not self.processors[name]:
                raise RuntimeError(
                    f"{name} now holds {type(layer.processor).__name__} instead of the tvkernels "
                    "processor: something replaced it (set_attn_processor, enable_xformers..., "
                    "attention slicing, IP-Adapter, fuse_qkv_projections). Apply that first, or "
                    "call handle.remove()"
                )

    def place_hook(self, module: nn.Module, hook: Callable) -> None:
        """A forward hook that must stay, to be taken back on removal."""
        placed = module.register_forward_hook(hook)
        self._undo.append(placed.remove)
        self._placed.append((module, "_forward_hooks", placed.id, hook))

    def place_module(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        """A child that must stay, new or instead of another, to be taken back on removal."""
        self._undo.append(partial(_take_back, parent, name, module, getattr(parent, name, None)))
        setattr(parent, name, module)
        self._placed.append((parent, "_modules", name, module))

    def place_forward(self, module: nn.Module, forward: Callable) -> None:
        """A `forward` of one module alone; what wraps it later stays on removal."""
        module.forward = forward
        self._undo.append(partial(_unwrap, module, forward))

    def _enter(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Before every call of the model: are we still in place, how many frames, what size."""
        if "cross_attention_kwargs" in self._parameters[: len(args)]:
            first = self._parameters.index("cross_attention_kwargs")
            kwargs = {**dict(zip(self._parameters[first:], args[first:], strict=False)), **kwargs}
            args = args[:first]
        named = dict(kwargs.get("cross_attention_kwargs") or {})
        frames, one_clip, checked = named.get("num_frames"), False, False
        if named:
            # Layers left alone would warn of keywords that they do not know.
            named.pop("num_frames", None)
            one_clip = named.pop("one_clip", False)
            checked = named.pop("checked", False)
            named = {n: v for n, v in named.items() if v is not None or n not in OPTIONAL}
            kwargs = {**kwargs, "cross_attention_kwargs": named or None}
        if torch.compiler.is_compiling():
            self._check_processors()  # what more there is would be fixed in the graph
        elif not checked:
            self.check()
        sample = args[0] if args else kwargs["sample"]
        if sample.dim() == 5:
            told = self.clip.num_frames if frames is None else frames
            frames = sample.shape[self._frame_axis]
            if told not in (None, frames):
                raise ValueError(f"the sample holds {frames} frames, num_frames says {told}")
        timestep = args[1] if len(args) > 1 else kwargs.get("timestep")
        self.clip.one_time = not isinstance(timestep, Tensor) or timestep.numel() == 1
        self.clip.one_clip = one_clip
        self.clip.call_frames, self.clip.size = frames, (sample.shape[-2], sample.shape[-1])
        self.clip.images = sample.shape[0] * (frames if sample.dim() == 5 else 1)
        if sample.dim() == 4:
            self.clip.frames(sample.shape[0])
        return args, kwargs


def _take_back(parent: nn.Module, name: str, ours: nn.Module, before: nn.Module | None) -> None:
    """Undoes `place_module`, also inside of what an adapter has put around ours."""
    if before is None:
        delattr(parent, name)
        return
    while (there := getattr(parent, name)) is not ours and hasattr(there, "base_layer"):
        parent, name = there, "base_layer"
    setattr(parent, name, before)


def _unwrap(module: nn.Module, ours: Callable) -> None:
    if vars(module).get("forward") is ours:
        del module.forward


def install(
    model: nn.Module,
    pattern: Patterns,
    *,
    num_frames: int | None = None,
    backend: str = "auto",
    attention: str | None = None,
) -> Handle:
    """Swaps the self-attention processors of a diffusers model, in place and undoable.

    Serves UNet2DConditionModel and ControlNets (frames in the batch, [B * F, C, h, w]), and the
    video UNets (UNetMotionModel, UNet3DConditionModel, I2VGenXLUNet, [B, C, F, h, w];
    UNetSpatioTemporalConditionModel, [B, F, C, h, w]). Their layers over frames get
    `temporal_attention`. Cross-attention is left alone, so text stays [B * F, L, C] there.

    Args:
        model: a diffusers UNet or ControlNet over latents.
        pattern: one for all layers, or layer-name prefix -> pattern (the longest prefix wins,
            layers that none names are left alone): {"up_blocks": ...} for Pix2Video.
        num_frames: frames per clip; None takes `cross_attention_kwargs={"num_frames": F}` of each
            call, and without it the whole batch as one clip.
        backend: of the ops.
        attention: a name of `processors.libraries.LIBRARIES` ("sdpa", "xformers", "flash-attn",
            ...) in place of our op, for layers that read their own frame alone.
    Returns:
        The handle: `.layers` names what was patched, `.remove()` restores.
    Raises:
        TypeError: another kind of model, or layers with tokens that may be positions or frames.
        RuntimeError: already patched, or layers hold processors that are not diffusers' defaults
            (fused, sliced, xformers, ...); the text names them.
        ValueError: the pattern matches no layer, or names one that `attention` cannot honour.
        ImportError: the library is not installed.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile, which sees the change itself
    clip = Clip(num_frames)
    chosen = choose_processors(model, pattern, clip, backend, attention)
    layers = attention_layers(model)
    handle = Handle(model, clip)
    for name, processor in chosen.items():
        handle.set_processor(name, layers[name], processor)
    return handle


def choose_processors(
    model: nn.Module, pattern: Patterns, clip: Clip, backend: str, attention: str | None = None
) -> dict[str, AttnProcessor]:
    """Layer name -> the processor that `install` gives it; raises as `install` does."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"a {type(model).__name__} is no model: give the unet of a pipeline")
    refuse_patched(model)
    patterns = {"": pattern} if isinstance(pattern, FramePattern) else pattern
    if not isinstance(patterns, Mapping):
        raise ValueError(f"a pattern is a FramePattern, or one for each prefix, not {pattern!r}")
    layers = attention_layers(model)
    axes = token_axes(model)
    for prefix in patterns:
        if prefix and not any(name.startswith(prefix) for name in layers):
            raise ValueError(
                f"no self-attention layer of this {type(model).__name__} is named {prefix!r}: "
                f"they are {', '.join(dict.fromkeys(name.partition('.')[0] for name in layers))}"
            )
    distinct = list(dict.fromkeys(patterns.values()))
    chosen: dict[str, AttnProcessor] = {}
    for name, layer in layers.items():
        prefixes = [p for p in patterns if name.startswith(p)]
        if not prefixes or layer.is_cross_attention:
            continue
        if axes[name] == "frames":  # in motion modules attn1 and attn2 are both self-attention
            chosen[name] = TemporalAttnProcessor(clip, backend)
        elif name.endswith("attn1"):
            if axes[name] is None:
                raise TypeError(
                    f"{name} of this {type(model).__name__} stands in no module that tvkernels "
                    "knows, so its tokens may be positions or frames: install serves diffusers' "
                    "UNets and ControlNets over latents"
                )
            own = patterns[max(prefixes, key=len)]
            if attention is None:
                chosen[name] = FrameAttnProcessor(own, clip, backend, distinct.index(own))
                continue
            if own != FramePattern.own():
                raise ValueError(
                    f"attention={attention!r} attends within a frame, and the pattern of {name} "
                    "names others: leave it out, frame_attention honours the pattern"
                )
            chosen[name] = LibraryAttnProcessor(attention, clip)
    if not any(isinstance(p, (FrameAttnProcessor, LibraryAttnProcessor)) for p in chosen.values()):
        raise ValueError(
            f"no self-attention layer of this {type(model).__name__} is one to serve: install "
            "serves attn1 of transformer blocks over the positions of a frame"
        )
    check_replaceable({name: layers[name] for name in chosen})
    return chosen


def token_axes(model: nn.Module) -> dict[str, str | None]:
    """Attention layer -> what its tokens are: "positions" of a frame, "frames" of a position, or
    None where no module around it tells.

    Raises:
        TypeError: not a model that is called with latents.
    """
    if "sample" not in inspect.signature(type(model).forward).parameters:
        raise TypeError(
            f"a {type(model).__name__} is not called with latents [B * F, C, h, w]: install "
            "serves diffusers' UNets and ControlNets"
        )
    kinds = {"positions": POSITIONS, "frames": FRAMES}
    around: dict[str, str | None] = {}
    for name, module in model.named_modules():  # parents first
        told = (kind for kind, names in kinds.items() if is_a(module, *names))
        around[name] = next(told, around.get(name.rpartition(".")[0]) if name else None)
    return {name: around[name] for name in attention_layers(model)}


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """name -> diffusers `Attention` layer, in the model's own order."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "set_processor")}


def refuse_patched(model: nn.Module) -> None:
    """Raises RuntimeError if a handle of ours is on the model."""
    if getattr(model, "_tvkernels_handle", None) is not None:
        raise RuntimeError(
            f"this {type(model).__name__} is already patched by tvkernels: "
            "call handle.remove() first"
        )


def check_replaceable(layers: Mapping[str, nn.Module]) -> None:
    """Refuses layers whose processors ours would silently override.

    The processor tells, not `fused_projections`: diffusers leaves that flag on after unfusing.
    """
    kinds = {name: type(layer.processor).__name__ for name, layer in layers.items()}
    reasons = [
        f"{name} holds {kind}: {REMEDIES.get(kind, 'call set_default_attn_processor() first')}"
        for name, kind in kinds.items()
        if kind not in REPLACEABLE
    ]
    if reasons:
        more = f" (and {len(reasons) - 3} more layers)" if len(reasons) > 3 else ""
        raise RuntimeError("cannot patch this model: " + "; ".join(reasons[:3]) + more)
