"""A diffusers UNet2DConditionModel made a recipe's video UNet, in place and undoable."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from tvkernels.nn import (
    ClipGroupNorm,
    ShiftRestrictedTemporalAttention,
    SpectralLinear,
    TemporalAttention,
)
from tvkernels.patterns import FramePattern
from tvkernels.processors.attention import TextAttnProcessor
from tvkernels.processors.clip import Clip
from tvkernels.processors.install import (
    Handle,
    attention_layers,
    check_replaceable,
    choose_processors,
)
from tvkernels.recipes import Recipe, TemporalModule

# Inputs beside the text that other families need (SDXL, unCLIP, class-conditional models).
FOREIGN = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "num_class_embeds")


class InflatedHandle(Handle):
    """The handle of an inflated UNet: what it tunes, and what of it is worth keeping.

    Args:
        model, clip: as for `Handle`.
        recipe: what the model is inflated to.
    """

    def __init__(self, model: nn.Module, clip: Clip, recipe: Recipe):
        super().__init__(model, clip)
        self.recipe = recipe
        self._spectral: list[SpectralLinear] = []

    def tuned_parameters(self) -> dict[str, nn.Parameter]:
        """name -> parameter that tuning reaches; all others are frozen."""
        return {n: p for n, p in self.model.named_parameters() if is_tuned(n, self.recipe)}

    def tuned_state(self) -> dict[str, Tensor]:
        """What tuning changes, parameters and power-iteration vectors, detached, by name."""
        state = self.model.state_dict()
        return {n: t.detach().clone() for n, t in state.items() if is_tuned(n, self.recipe)}

    def load_tuned_state(self, state: dict[str, Tensor]) -> None:
        """Takes back what `tuned_state` gave.

        Raises:
            ValueError: names or shapes are not this recipe's on this UNet.
        """
        own = self.tuned_state()
        wrong = sorted(own.keys() ^ state.keys())
        wrong += [n for n in own.keys() & state.keys() if own[n].shape != state[n].shape]
        if wrong:
            raise ValueError(
                f"tuned weights do not fit the recipe {self.recipe.name}: {wrong[0]} differs "
                f"({len(wrong)} in all)"
            )
        self.model.load_state_dict(state, strict=False)

    def keep(self, tensors: dict[str, Tensor]) -> None:
        """Has `remove` put back these values, given by state-dict name, as they are now."""
        kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._undo.append(partial(self.model.load_state_dict, kept, strict=False))

    def _enter(self, model, args, kwargs):
        if torch.is_grad_enabled():
            for module in self._spectral:
                if module.weight.requires_grad:
                    module.power_iterate()
        return super()._enter(model, args, kwargs)


def inflate(
    unet: nn.Module,
    recipe: Recipe,
    *,
    num_frames: int | None = None,
    backend: str = "auto",
    generator: torch.Generator | None = None,
) -> InflatedHandle:
    """Turns a UNet2DConditionModel into the recipe's video UNet, in place.

    Afterwards frames are the batch, guidance-major, and text is given once per sample:
    ``unet(sample [B * F, 4, h, w], t, text [B, L, C], cross_attention_kwargs={"num_frames": F})``.
    Parameters outside the recipe's `tuned` are frozen.

    Args:
        unet: diffusers' UNet2DConditionModel of the SD-1.x family.
        recipe: `tvkernels.recipes.EI2`, `TUNE_A_VIDEO`, or one's own.
        num_frames: frames per clip, if the same for every call; see `install`.
        backend: of frame_attention.
        generator: draws the added modules' weights; torch's default one if None.
    Returns:
        The handle; `handle.remove()` restores the UNet bit for bit, tuned weights included.
    Raises:
        TypeError: not a UNet2DConditionModel of that family.
        RuntimeError: already patched, or its processors are not diffusers' defaults.
        ValueError: the recipe does not fit the UNet, which is left as it was.
    """
    unet = getattr(unet, "_orig_mod", unet)  # of torch.compile, which sees the change itself
    _check_family(unet)
    pattern = recipe.pattern
    pattern = pattern if isinstance(pattern, FramePattern) else dict(pattern)
    clip = Clip(num_frames)
    chosen = choose_processors(unet, pattern, clip, backend)
    layers = attention_layers(unet)
    cross = {name: layer for name, layer in layers.items() if name.endswith("attn2")}
    check_replaceable(cross)
    handle = InflatedHandle(unet, clip, recipe)
    try:
        for name, processor in {**chosen, **{n: TextAttnProcessor(clip) for n in cross}}.items():
            handle.set_processor(name, layers[name], processor)
        _snapshot(handle)
        if recipe.clip_group_norm:
            _pool_group_norms(handle)
        if recipe.temporal is not None:
            _add_temporal(handle, recipe.temporal, generator)
    except BaseException:
        handle.remove()
        raise
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(is_tuned(name, recipe))
    return handle


def is_tuned(name: str, recipe: Recipe) -> bool:
    """Whether a parameter of that name belongs to what the recipe tunes."""
    return any(f".{part}." in f".{name}." for part in recipe.tuned)


def _check_family(unet: nn.Module) -> None:
    need = "inflate needs diffusers' UNet2DConditionModel of an SD-1.x model, got "
    if not any(kind.__name__ == "UNet2DConditionModel" for kind in type(unet).__mro__):
        raise TypeError(need + type(unet).__name__)
    foreign = {key: getattr(unet.config, key, None) for key in FOREIGN}
    foreign = {key: value for key, value in foreign.items() if value is not None}
    if foreign:
        raise TypeError(f"{need}one with {foreign}")


def _snapshot(handle: InflatedHandle) -> None:
    """Keeps the values that tuning will change and who required gradients, for `remove`.

    By module, not by full name: LoRA layers added later rename parameters.
    """
    tuned = set(handle.tuned_parameters().values())
    for module in handle.model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            value = parameter.detach().clone() if parameter in tuned else None
            handle._undo.append(partial(_restore, module, key, parameter.requires_grad, value))


def _restore(module: nn.Module, key: str, required: bool, value: Tensor | None) -> None:
    parameter = getattr(module, key).requires_grad_(required)
    parameter.grad = None
    if value is not None:
        with torch.no_grad():
            parameter.copy_(value)


def _pool_group_norms(handle: InflatedHandle) -> None:
    """The ResNets' norms and the last one; a transformer's own norm stays per frame."""
    for parent in list(handle.model.modules()):
        in_resnet = type(parent).__name__ == "ResnetBlock2D"
        for name, norm in list(parent.named_children()):
            last = parent is handle.model and name == "conv_norm_out"
            if isinstance(norm, nn.GroupNorm) and (in_resnet or last):
                setattr(parent, name, ClipGroupNorm(norm, handle.clip))
                handle._undo.append(partial(setattr, parent, name, norm))


def _add_temporal(
    handle: InflatedHandle, spec: TemporalModule, generator: torch.Generator | None
) -> None:
    for block in list(handle.model.modules()):
        if type(block).__name__ != "BasicTransformerBlock":
            continue
        module = build_temporal(block.attn1.query_dim, block.attn1.heads, spec, generator)
        block.attn_temp = module.to(handle.model.device, handle.model.dtype).train(block.training)
        handle._undo.append(partial(delattr, block, "attn_temp"))
        hook = block.register_forward_hook(partial(_run_temporal, handle.clip))
        handle._undo.append(hook.remove)
        handle._spectral += [m for m in module.modules() if isinstance(m, SpectralLinear)]


def _run_temporal(clip: Clip, block: nn.Module, args: tuple, out: Tensor) -> Tensor:
    return block.attn_temp(clip.split(out)).flatten(0, 1)


def build_temporal(
    dim: int, heads: int, spec: TemporalModule, generator: torch.Generator | None = None
) -> TemporalAttention:
    """The module a recipe adds to a block of `dim` channels.

    Raises:
        ValueError: spectral norms without centering, or with a zero start, which has no norm.
    """
    with torch.random.fork_rng(enabled=generator is not None, devices=()):
        if generator is not None:
            seed = torch.randint(2**62, (), generator=generator, device=generator.device)
            torch.manual_seed(seed.item())
        if not spec.spectral:
            return TemporalAttention(dim, heads, spec.norm, spec.start)
        if spec.norm != "centering" or spec.start != "zero_bias":
            raise ValueError(f"spectral norms need centering and a zero bias, got {spec}")
        return ShiftRestrictedTemporalAttention(dim, heads)
