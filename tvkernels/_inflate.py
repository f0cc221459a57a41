"""A diffusers UNet2DConditionModel made a recipe's video UNet, in place and undoable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from tvkernels.nn import (
    ClipGroupNorm,
    ShiftRestrictedTemporalAttention,
    SpectralLinear,
    TemporalAttention,
    TemporalUNet,
)
from tvkernels.nn.temporal_unet import Joint
from tvkernels.nn.time import Projection, TimeTable, embed, project
from tvkernels.patterns import FramePattern
from tvkernels.processors.attention import TextAttnProcessor, project_context
from tvkernels.processors.clip import Clip, Span
from tvkernels.processors.install import (
    Handle,
    attention_layers,
    check_replaceable,
    choose_processors,
)
from tvkernels.processors.touched import Guests, every, guests, is_a, untouched
from tvkernels.recipes import Recipe, TemporalModule, TemporalUnet

# Inputs beside the text that other families need (SDXL, unCLIP, class-conditional models).
FOREIGN = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "num_class_embeds")

# Tokens that a feed-forward takes at a time: its inner 16 C a token set the peak of a call. Whole
# against 2048 on two cores, ms and MiB beyond the input: 543 and 480 against 316 and 50 (48 images
# of 1024 tokens, C 160), 501 and 320 against 376 and 60 (16 of 1024, 320), 486 and 320 against 476
# and 100 (4 of 4096, 320), 1195 and 480 against 982 and 110 (48 of 256, 640); the same bits. On a
# device, where a part must fill it, the number is not measured.
ROWS = {"cpu": 2048}
ROWS_ON_DEVICE = 16384


CAST = (
    "inflate needs weights that are stored as they compute, this UNet casts its own layer by "
    "layer, which fused kernels would read: load it without enable_layerwise_casting()"
)
STALE_TIME = (
    "a row of projected timesteps passes by what was put on the UNet's time layers later (LoRA, "
    "hooks, offloading): call it with the timestep"
)


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
        self._time: TimeTable | None = None
        self._seen = ((), False)  # adapters, and whether weights are offloaded

    def tuned_parameters(self) -> dict[str, nn.Parameter]:
        """name -> parameter that tuning reaches; all others are frozen."""
        return {n: p for n, p in self.model.named_parameters() if is_tuned(n, self.recipe)}

    def tuned_state(self) -> dict[str, Tensor]:
        """What tuning changes, parameters and power-iteration vectors, detached, by name: the
        layer's own, whatever adapter has been put around it.
        """
        return {n: t.detach().clone() for n, (_, t) in self._tuned_places().items()}

    def _tuned_places(self) -> dict[str, tuple[str, Tensor]]:
        """Name without adapters -> name in the model and tensor."""
        state = self.model.state_dict()
        return {
            n.replace(".base_layer.", "."): (n, t)
            for n, t in state.items()
            if is_tuned(n, self.recipe)
        }

    def load_tuned_state(self, state: dict[str, Tensor]) -> None:
        """Takes back what `tuned_state` gave.

        Raises:
            ValueError: names or shapes are not this recipe's on this UNet.
        """
        own = self._tuned_places()
        wrong = sorted(own.keys() ^ state.keys())
        wrong += [n for n in own.keys() & state.keys() if own[n][1].shape != state[n].shape]
        if wrong:
            raise ValueError(
                f"tuned weights do not fit the recipe {self.recipe.name}: {wrong[0]} differs "
                f"({len(wrong)} in all)"
            )
        self.model.load_state_dict({own[n][0]: t for n, t in state.items()}, strict=False)

    @property
    def text_width(self) -> int | None:
        """P of `project_text`'s result; None where it could not be told from text states."""
        spans = [getattr(processor, "span", None) for processor in self.processors.values()]
        return next((span.total for span in spans if span is not None), None)

    @property
    def time_width(self) -> int | None:
        """T of `project_time`'s result; None where the UNet has no such table."""
        return self._time.width if self._time else None

    def holds_text(self, found: Guests | None = None) -> bool:
        """Whether `project_text` stands for the text: there are no hooks on the layers, and their
        weights are where they can be read."""
        if self.text_width is None or (found or guests(self.model)).moved:
            return False
        return self.text_untouched()

    @property
    def adapters(self) -> tuple:
        """What adapters and FreeU did at the last `check`, see `touched.Guests`."""
        return self._seen[0]

    def text_untouched(self) -> bool:
        """Whether there are no hooks on the layers that project text."""
        return all(untouched(part) for layer in self._cross() for part in (layer.to_k, layer.to_v))

    def holds_time(self, found: Guests | None = None) -> bool:
        """Whether `project_time` stands for the timestep, as `holds_text`; nor are there layers
        that came after inflation.

        Args:
            found: what sits on the model, if it is known.
        """
        if self._time is None or not self._time.in_place():
            return False
        return not (found or guests(self.model)).moved

    def _cross(self) -> list[nn.Module]:
        return [
            self._layers[name]
            for name, processor in self.processors.items()
            if isinstance(processor, TextAttnProcessor)
        ]

    @torch.no_grad()
    def project_text(self, states: Tensor) -> Tensor:
        """The keys and values of every cross-attention, for all steps and frames of an edit.

        The UNet takes the result in place of the states, as `encoder_hidden_states`; it holds for
        the weights of now.

        Args:
            states: [B, L, C] text states.
        Returns:
            [B, L, P]: each layer's keys, then its values, layer after layer.
        Raises:
            ValueError: the states are of another width than the UNet's text.
        """
        width = self.model.config.cross_attention_dim
        if states.dim() != 3 or states.shape[-1] != width:
            raise ValueError(f"text states are [B, L, {width}], got {tuple(states.shape)}")
        layers = self._cross()
        own = _beside(layers[0].to_k, states)  # an offloaded UNet may be elsewhere
        pairs = (project_context(layer, own, cross=True) for layer in layers)
        return torch.cat([x.flatten(2) for pair in pairs for x in pair], -1).to(states.device)

    @torch.no_grad()
    def project_time(self, timesteps: Tensor, found: Guests | None = None) -> Tensor:
        """What every ResNet adds for its timestep, for a whole schedule.

        The UNet takes a row [1, T] of it as `timestep_cond` and then ignores the timestep.

        Args:
            timesteps: [S].
        Returns:
            [S, T], layer after layer.
        Raises:
            ValueError: the UNet embeds more than the timestep (LCM's guidance, an activation
                after the embedding), which a table of timesteps cannot hold.
        """
        if self._time is None:
            raise ValueError("this UNet's time embedding has no table: call it with the timestep")
        if not self.holds_time(found):
            raise ValueError(STALE_TIME)
        own = _beside(self._time.projections[0].layer, timesteps)
        return self._time.rows(own).to(timesteps.device)

    def check(self) -> Guests:
        """As `Handle.check`.

        Raises:
            TypeError: weights are cast layer by layer, which was switched on after inflation.
        """
        found = super().check()
        if found.cast:
            raise TypeError(CAST)
        seen = (found.adapters, found.moved)
        if seen != self._seen:
            self._seen = seen
            for module in self._spectral:
                module.weight_changed()  # a merge leaves no trace on a weight
                module.offloaded = found.moved
        return found

    def weights_changed(self) -> None:
        """Works out anew what was worked out from the weights."""
        for module in self._spectral:
            module.weight_changed()
        self.settle()

    def settle(self) -> None:
        """Works out now what sampling would work out from the weights at its first call.

        A program taken from the UNet then reads spectral norms and does not compute them.
        """
        if guests(self.model).moved:
            return  # it is only at the call that the weights are there
        with torch.no_grad():
            for module in self._spectral:
                _ = module.sigma

    def compile_blocks(self, **how) -> None:
        """Has torch.compile take each transformer block for itself, until `remove`.

        Args:
            how: torch.compile's arguments.
        """
        for block in _blocks(self.model):
            self._undo.append(partial(setattr, block, "_compiled_call_impl", None))
            vars(block.ff).pop("forward", None)  # one object each would be one graph each
            block.compile(**how)

    def remove(self) -> None:
        """As `Handle.remove`.

        Raises:
            ValueError: offloading layer by layer has been switched on since, and would not reach
                the layers that come back.
        """
        placed = any(where == "_modules" for _, where, *_ in self._placed)
        if self._undo and placed and guests(self.model).moved:
            raise ValueError(
                "layers that are offloaded one by one cannot be taken back: call remove() before "
                "enable_group_offload(), or load the model again"
            )
        super().remove()

    def keep(self, tensors: dict[str, Tensor]) -> None:
        """Has `remove` put back these values, given by state-dict name, as they are now."""
        kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._undo.append(partial(self.model.load_state_dict, kept, strict=False))

    def _enter(self, model, args, kwargs):
        if torch.is_grad_enabled():
            for module in self._spectral:
                if module.weight.requires_grad:
                    module.power_iterate()
        args, kwargs = super()._enter(model, args, kwargs)
        if self._time is not None:
            place = self._parameters.index("timestep_cond")
            row = args[place] if len(args) > place else kwargs.get("timestep_cond")
            if row is not None and not torch.compiler.is_compiling() and not self._time.in_place():
                raise ValueError(STALE_TIME)
            self._time.begin(row is not None)
        return args, kwargs


def inflate(
    unet: nn.Module,
    recipe: Recipe,
    *,
    num_frames: int | None = None,
    backend: str = "auto",
    attention: str | None = None,
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
        backend: of frame_attention, and of token_map_attention where a call asks for maps.
        attention: another library's in place of ours and PyTorch's own, see `install`.
        generator: draws the added modules' weights; torch's default one if None.
    Returns:
        The handle; `handle.remove()` restores the UNet bit for bit, tuned weights included.
    Raises:
        TypeError: not a UNet2DConditionModel of that family.
        RuntimeError: already patched, or its processors are not diffusers' defaults.
        ValueError: the recipe does not fit the UNet, which is left as it was, or `attention`
            cannot honour its pattern.
        ImportError: that library is not installed.
    """
    unet = getattr(unet, "_orig_mod", unet)  # of torch.compile, which sees the change itself
    _check_family(unet, recipe)
    pattern = recipe.pattern
    pattern = pattern if isinstance(pattern, FramePattern) else dict(pattern)
    clip = Clip(num_frames)
    chosen = choose_processors(unet, pattern, clip, backend, attention)
    layers = attention_layers(unet)
    cross = {name: layer for name, layer in layers.items() if name.endswith("attn2")}
    check_replaceable(cross)
    handle = InflatedHandle(unet, clip, recipe)
    try:
        chosen |= _text_processors(cross, clip, attention or "sdpa", backend)
        for name, processor in chosen.items():
            handle.set_processor(name, layers[name], processor)
        _snapshot(handle)
        _share_time(handle)
        if recipe.clip_group_norm:
            _pool_group_norms(handle)
        _part_feed_forwards(handle)
        if recipe.temporal is not None:
            _add_temporal(handle, recipe.temporal, generator)
        if recipe.temporal_unet is not None:
            _add_temporal_unet(handle, recipe.temporal_unet, generator)
    except BaseException:
        handle.remove()
        raise
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(is_tuned(name, recipe))
    return handle


def is_tuned(name: str, recipe: Recipe) -> bool:
    """Whether a parameter of that name belongs to what the recipe tunes; an adapter's does not."""
    return ".lora_" not in name and any(f".{part}." in f".{name}." for part in recipe.tuned)


def _check_family(unet: nn.Module, recipe: Recipe) -> None:
    need = "inflate needs diffusers' UNet2DConditionModel of an SD-1.x model, got "
    if not is_a(unet, "UNet2DConditionModel"):
        raise TypeError(need + type(unet).__name__)
    foreign = {key: getattr(unet.config, key, None) for key in FOREIGN}
    foreign = {key: value for key, value in foreign.items() if value is not None}
    if foreign:
        raise TypeError(f"{need}one with {foreign}")
    found = guests(unet)
    if found.cast:
        raise TypeError(CAST)
    adds = recipe.clip_group_norm, recipe.temporal, recipe.temporal_unet
    if found.moved and any(adds):
        raise TypeError(
            f"the recipe {recipe.name} adds layers, which offloading that is on already does not "
            "reach: switch it on after inflation"
        )


def _snapshot(handle: InflatedHandle) -> None:
    """Keeps the values that tuning will change and who required gradients, for `remove`.

    By module, not by full name: LoRA layers added later rename parameters.
    """
    tuned = set(handle.tuned_parameters().values())
    for module in handle.model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            value = parameter.detach().clone() if parameter in tuned else None
            before = partial(_restore, module, key, parameter.requires_grad, value)
            handle._undo.append(partial(before, _written(parameter)))


def _written(parameter: nn.Parameter) -> tuple | None:
    """Which writes this very parameter has seen, not a copy of it; None where nothing counts."""
    return None if parameter.is_inference() else (id(parameter), parameter._version)


def _restore(
    module: nn.Module, key: str, required: bool, value: Tensor | None, written: tuple | None
) -> None:
    parameter = getattr(module, key)
    # What is tuned needs gradients until an adapter is loaded, and a merge leaves no other trace.
    merged = not parameter.requires_grad and written is not None and written == _written(parameter)
    parameter.requires_grad_(required).grad = None
    if value is not None and not merged:
        with torch.no_grad():
            parameter.copy_(value)


def _beside(layer: nn.Module, x: Tensor) -> Tensor:
    """`x` where the layer's weight is; as it is for weights that hooks fetch when called."""
    device = next(layer.parameters()).device
    return x if device.type == "meta" else x.to(device)


def spans(widths: list[int]) -> list[Span]:
    """Parts of those widths, one after the other."""
    ends = [0, *accumulate(widths)]
    return [Span(a, b - a, ends[-1]) for a, b in pairwise(ends)]


def _text_processors(
    cross: dict[str, nn.Module], clip: Clip, library: str, backend: str
) -> dict[str, TextAttnProcessor]:
    parts = spans([2 * layer.inner_kv_dim for layer in cross.values()])
    return {
        name: TextAttnProcessor(
            clip, None if part.total == layer.cross_attention_dim else part, library, backend
        )
        for (name, layer), part in zip(cross.items(), parts, strict=True)
    }


def _share_time(handle: InflatedHandle) -> None:
    """One row of time embedding where one timestep serves the call, and room for a table."""
    unet = handle.model
    if unet.config.time_cond_proj_dim is not None or unet.time_embed_act is not None:
        return
    resnets = list(_resnets(unet))
    layers = [resnet.time_emb_proj for resnet in resnets]
    widths = [getattr(layer, "out_features", None) for layer in layers]
    if not widths or None in widths or sum(widths) == unet.time_embedding.linear_2.out_features:
        return  # a table could not be told from an embedding
    forward = partial(embed, unet.time_embedding.forward, handle.clip)
    handle.place_forward(unet.time_embedding, forward)
    parts = []
    for resnet, layer, span in zip(resnets, layers, spans(widths), strict=True):
        own = partial(project, layer.forward, span)
        handle.place_forward(layer, own)
        handle._undo.append(partial(setattr, resnet, "skip_time_act", resnet.skip_time_act))
        parts.append(Projection(resnet, layer, own, span, resnet.skip_time_act))
    handle._time = TimeTable(unet, unet.time_embedding, forward, handle.clip, parts)


def _blocks(unet: nn.Module) -> Iterator[nn.Module]:
    """Transformer blocks, whatever class they are of."""
    return (m for m in unet.modules() if hasattr(m, "attn1") and hasattr(m, "ff"))


def _resnets(unet: nn.Module) -> Iterator[nn.Module]:
    return (m for m in unet.modules() if hasattr(m, "time_emb_proj") and hasattr(m, "conv1"))


def _pool_group_norms(handle: InflatedHandle) -> None:
    """The ResNets' norms and the last one; a transformer's own norm stays per frame."""
    unet = handle.model
    norms = [(unet, "conv_norm_out", unet.conv_norm_out)]
    norms += [(r, name, norm) for r in _resnets(unet) for name, norm in r.named_children()]
    for parent, name, norm in norms:
        if isinstance(norm, nn.GroupNorm):
            handle.place_module(parent, name, ClipGroupNorm(norm, handle.clip))


def _part_feed_forwards(handle: InflatedHandle) -> None:
    for block in _blocks(handle.model):
        handle.place_forward(block.ff, partial(_in_parts, block.ff, block.ff.forward))


def _in_parts(
    ff: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, *args, **kwargs
) -> Tensor:
    """A feed-forward of [n, tokens, C], some images at a time; whole where it is differentiated,
    compiled, or hooks on its layers look at the batch.
    """
    # Asked first: a size that is looked at would be fixed in an exported program.
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return forward(x, *args, **kwargs)
    images = max(ROWS.get(x.device.type, ROWS_ON_DEVICE) // x.shape[1], 1)
    if len(x) <= images or not all(untouched(layer) for layer in every(ff) if layer is not ff):
        return forward(x, *args, **kwargs)
    out = torch.empty_like(x)
    for part, place in zip(x.split(images), out.split(images), strict=True):
        place.copy_(forward(part, *args, **kwargs))
    return out


def _add_temporal(
    handle: InflatedHandle, spec: TemporalModule, generator: torch.Generator | None
) -> None:
    for block in list(_blocks(handle.model)):
        module = build_temporal(block.attn1.query_dim, block.attn1.heads, spec, generator)
        module.to(handle.model.device, handle.model.dtype).train(block.training)
        handle.place_module(block, "attn_temp", module)
        handle.place_hook(block, partial(_run_temporal, handle.clip))
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
    with _drawn_by(generator):
        if not spec.spectral:
            return TemporalAttention(dim, heads, spec.norm, spec.start)
        if spec.norm != "centering" or spec.start != "zero_bias":
            raise ValueError(f"spectral norms need centering and a zero bias, got {spec}")
        return ShiftRestrictedTemporalAttention(dim, heads)


def _add_temporal_unet(
    handle: InflatedHandle, spec: TemporalUnet, generator: torch.Generator | None
) -> None:
    unet, config = handle.model, handle.model.config
    heads = next(m.heads for name, m in attention_layers(unet).items() if name.endswith("attn1"))
    with _drawn_by(generator):
        net = TemporalUNet(
            config.in_channels, config.block_out_channels, config.layers_per_block,
            config.norm_num_groups, heads, middle=unet.mid_block is not None, **asdict(spec),
        )  # fmt: skip
    handle.place_module(
        unet, "temporal_unet", net.to(unet.device, unet.dtype).train(unet.training)
    )
    joint = Joint(handle.clip, net)
    hooks = [(unet.conv_in, joint.begin)] if spec.branch else []
    if net.mid_stb is not None:
        hooks.append((unet.mid_block, partial(joint.join, net.mid_stb)))
    pairs = zip(unet.up_blocks, net.up_stb, strict=True)
    hooks += [(block, partial(joint.join, unit)) for block, unit in pairs]
    for block, run in hooks:
        handle.place_hook(block, run)


@contextmanager
def _drawn_by(generator: torch.Generator | None) -> Iterator[None]:
    """Inside, torch's own draws follow a generator, if there is one."""
    with torch.random.fork_rng(enabled=generator is not None, devices=()):
        if generator is not None:
            seed = torch.randint(2**62, (), generator=generator, device=generator.device)
            torch.default_generator.manual_seed(seed.item())  # and no other device's
        yield
