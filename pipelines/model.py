"""A method's pipeline as it is loaded, adapted and saved, by diffusers' own loaders."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders import (
    FromSingleFileMixin,
    StableDiffusionLoraLoaderMixin,
    TextualInversionLoaderMixin,
)
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

import tvkernels
from tvkernels import inflate
from tvkernels._ranges import watch
from tvkernels.pipelines.cache import Cache, adapted, content_key
from tvkernels.pipelines.checks import (
    ModelError,
    check_embedding,
    check_lora,
    check_unet,
    check_vae,
    single_file_config,
    vae_factor,
)
from tvkernels.pipelines.common import (
    ddim_schedulers,
    encode_frames,
    frames_to_tensor,
    make_tunable,
)
from tvkernels.pipelines.text import check_texts, encode_text
from tvkernels.recipes import Recipe
from tvkernels.runtime import accelerate

TUNED = "-tuned"  # behind the recipe's name


@dataclass(frozen=True)
class Settings:
    """A method's numbers.

    Args:
        recipe: the video UNet.
        frames: frames the method was published with; a default, not a limit.
        tune_steps, learning_rate, weight_decay: one-shot tuning with AdamW; 0 steps tune nothing.
        steps: DDIM steps of inversion and of sampling.
        guidance: classifier-free guidance scale of sampling.
        inversion_prompt: what the inversion is told.
    """

    recipe: Recipe
    frames: int
    tune_steps: int
    learning_rate: float
    weight_decay: float
    steps: int
    guidance: float
    inversion_prompt: str = ""


def _adapting(method):
    """A loader's method that changes layers: it sees the UNet as it was loaded, see `_plain`."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        with self._plain(f"{method.__name__}()"):
            return method(self, *args, **kwargs)

    return run


def _weighing(method):
    """A loader's method that changes how much adapters count: nothing prepared holds any more."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        result = method(self, *args, **kwargs)
        self._start_runtime()
        return result

    return run


class InflatedPipeline(
    DiffusionPipeline,
    FromSingleFileMixin,
    StableDiffusionLoraLoaderMixin,
    TextualInversionLoaderMixin,
):
    """A method's models, loaded, adapted and saved as diffusers does it.

    The pipeline owns its UNet: it is inflated on construction, and `pipe.handle.remove()` gives
    the 2-D UNet back. Further prompts on the same clip need neither `fit` nor `invert` again.

    Args:
        vae, text_encoder, tokenizer, unet, scheduler: of an SD-1.x model in diffusers' layout; any
            scheduler, whose noise schedule DDIM then follows, and so for one that is set later.
        settings: other numbers than the method's own.
        backend: of frame_attention.
        attention: another library's, see `tvkernels.inflate`.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _callback_tensor_inputs = ("latents", "prompt_embeds")
    settings: Settings
    # Whether the edit is composed in pixels, so that decoding its latents would only blur it.
    in_pixels = False

    def __init__(
        self, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel, scheduler: KarrasDiffusionSchedulers,
        settings: Settings | None = None, backend: str = "auto", attention: str | None = None,
    ):  # fmt: skip
        super().__init__()
        check_unet(unet.config)
        check_vae(vae)
        self.register_modules(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler
        )
        self.settings = settings or type(self).settings
        self.backend, self.attention = backend, attention
        self.video_processor = VideoProcessor(do_resize=False)
        watch(vae)
        self.inverted: Tensor | None = None
        self._interrupt, self.num_timesteps = False, 0
        self._shape: torch.Size | None = None
        self.handle = None
        self._runtime: tuple[str, dict] = ("eager", {})
        self._inflate(torch.Generator().manual_seed(0))

    @property
    def multiple(self) -> int:
        """What both sides of a frame, in pixels, must divide by."""
        return vae_factor(self.vae.config)

    @property
    def _wide(self) -> torch.dtype:
        """Of latents and noise, whatever the models work in: float32, or float64 if they do."""
        return torch.promote_types(self.unet.dtype, torch.float32)

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` to leave the sampling loop after the step under way."""
        return self._interrupt

    def _inflate(self, generator: torch.Generator | None) -> None:
        if self.handle is not None:
            self._deflate()
        self.handle = self._inflated(self.unet, generator)
        self._start_runtime()

    def _deflate(self) -> None:
        make_tunable(self.unet)  # it may have been moved under inference mode
        self.handle.remove()

    def _inflated(self, unet, generator: torch.Generator | None):
        with torch.inference_mode(False):
            make_tunable(unet)
            return inflate(
                unet, self.settings.recipe, backend=self.backend, attention=self.attention,
                generator=generator,
            )  # fmt: skip

    def _start_runtime(self) -> None:
        backend, options = self._runtime
        self.runner = accelerate(self.unet, backend, **options)

    def accelerate(self, runtime: str = "eager", **options) -> InflatedPipeline:
        """Inverts and samples under another runtime from now on; tuning stays eager.

        Args:
            runtime: one of `tvkernels.runtime.BACKENDS`.
            options: that runtime's own.
        Returns:
            The pipeline.
        Raises:
            ValueError: unknown runtime or option.
            BackendError: it cannot run here; the text lists every reason.
        """
        before, self._runtime = self._runtime, (runtime, options)
        try:
            self._start_runtime()
        except BaseException:
            self._runtime = before
            raise
        return self

    def __setattr__(self, name: str, value) -> None:
        if name == "scheduler":  # another one is another noise schedule of the same DDIM
            given = value
            value, self.inverse_scheduler = ddim_schedulers(given)
            self._given_scheduler = given  # what is saved
        other = name == "unet" and self.__dict__.get("handle") and value is not self.unet
        if other:
            if hasattr(value, "_orig_mod"):
                raise ValueError('a compiled UNet cannot be inflated: call accelerate("compile")')
            check_unet(value.config)
            handle = self._inflated(value, torch.Generator().manual_seed(0))
            self._deflate()
        super().__setattr__(name, value)
        if other:
            self.handle, self.inverted, self._shape = handle, None, None
            self._start_runtime()

    def _is_inflated(self) -> bool:
        return getattr(self.unet, "_tvkernels_handle", None) is self.handle

    def _check_in_place(self, what: str) -> None:
        if self._is_inflated() and self.handle.check().moved:
            raise ValueError(
                f"layers that are offloaded one by one cannot be changed: call {what} before "
                "enable_group_offload(), or use enable_model_cpu_offload()"
            )

    def _check_inflated(self) -> None:
        if not self._is_inflated():
            raise ValueError(
                "the UNet is a plain one, handle.remove() was called: call fit() first"
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As diffusers has it; from a folder that `save_pretrained` wrote, with what was tuned.

        Raises:
            ModelError: what was tuned is broken.
            ValueError: it does not fit the UNet.
        """
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        folder, name = Path(pretrained_model_name_or_path), pipe.settings.recipe.name + TUNED
        if (folder / f"{name}.safetensors").is_file():
            state = Cache(folder).load(name)
            if state is None:
                raise ModelError(
                    f"{folder / name}.safetensors is broken: save it again or remove it"
                )
            pipe.handle.load_tuned_state(state)
            pipe.runner.weights_changed()
        return pipe

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path, **kwargs):
        """As diffusers has it, and offline: a .safetensors file in Stable Diffusion's layout.

        Args:
            pretrained_model_link_or_path: a file, or an address as diffusers takes it.
            kwargs: diffusers' own; `config` names a folder of configurations for models of other
                sizes than the embedded one's and Stable Diffusion 1.x.
        Raises:
            ModelError: no such file, a pickle, no whole model, or one of another family.
        """
        place = str(pretrained_model_link_or_path)
        if "://" not in place and not {"config", "original_config"} & kwargs.keys():
            kwargs["config"] = str(single_file_config(place))
        return super().from_single_file(place, **kwargs)

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict, adapter_name: str | None = None, **kwargs
    ):
        """As diffusers has it, before or after `fit`; the edit is that of a model loaded with it.

        Raises:
            ModelError: a pickle, or a file that changes nothing of this model.
        """
        given, name = pretrained_model_name_or_path_or_dict, adapter_name
        if not isinstance(given, dict) and Path(given).is_file():
            given = check_lora(given)
            kwargs["weight_name"], given = given.name, str(given.parent)
        name = name or f"default_{len(self._adapter_names())}"
        with self._plain("load_lora_weights()"):
            super().load_lora_weights(given, adapter_name=name, **kwargs)
        if name not in self._adapter_names():
            what = pretrained_model_name_or_path_or_dict
            what = "this LoRA" if isinstance(what, dict) else what
            raise ModelError(f"{what} fits no layer of this model: give a LoRA for SD-1.x")

    def _adapter_names(self) -> set[str]:
        return {name for names in self.get_list_adapters().values() for name in names}

    fuse_lora = _adapting(StableDiffusionLoraLoaderMixin.fuse_lora)
    unfuse_lora = _adapting(StableDiffusionLoraLoaderMixin.unfuse_lora)
    unload_lora_weights = _adapting(StableDiffusionLoraLoaderMixin.unload_lora_weights)
    delete_adapters = _adapting(StableDiffusionLoraLoaderMixin.delete_adapters)
    set_adapters = _weighing(StableDiffusionLoraLoaderMixin.set_adapters)
    enable_lora = _weighing(StableDiffusionLoraLoaderMixin.enable_lora)
    disable_lora = _weighing(StableDiffusionLoraLoaderMixin.disable_lora)

    def load_textual_inversion(
        self, pretrained_model_name_or_path, token: str | list[str] | None = None, **kwargs
    ):
        """As diffusers has it; a file that names no word of its own is called by the file's name.

        Raises:
            ModelError: a pickle, or no embedding of one text encoder.
        """
        given = pretrained_model_name_or_path
        several = given if isinstance(given, list) else [given]
        words = [
            None if isinstance(each, (dict, Tensor)) or not Path(each).is_file()
            else check_embedding(each)
            for each in several
        ]  # fmt: skip
        if token is None and None not in words:
            token = words if isinstance(given, list) else words[0]
        super().load_textual_inversion(given, token=token, **kwargs)

    @contextmanager
    def _plain(self, what: str) -> Iterator[None]:
        """Inside, the UNet is as it was loaded; then what was tuned is put back.

        Raises:
            ValueError: its layers are offloaded one by one, and `what` comes too late.
        """
        if not self._is_inflated():
            yield
            return
        self._check_in_place(what)
        state = self.handle.tuned_state()
        self._deflate()
        before = self._own(state)
        try:
            yield
        finally:
            now = self._own(state)
            self._inflate(torch.Generator().manual_seed(0))
            for name, old in before.items():
                new = now[name].to(old.device)  # loaders move an offloaded UNet
                if not torch.equal(new, old):  # an adapter was fused
                    state[name] += new - old
            self.handle.load_tuned_state(state)
            self.runner.weights_changed()

    def _own(self, names) -> dict[str, Tensor]:
        """The plain UNet's tensors of these names, whatever adapters are around their layers."""
        every = self.unet.state_dict().items()
        found = {name.replace(".base_layer.", "."): tensor for name, tensor in every}
        return {name: found[name].clone() for name in names if name in found}

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """A plain SD-1.x model that diffusers opens by any of its classes, as it was loaded.

        What the recipe added and `fit` tuned stands beside it, in a file that `from_pretrained` of
        a pipeline with the same recipe reads and others leave alone. Arguments as diffusers has
        them.

        Raises:
            ValueError: the models hold adapters, which no plain model does, or the UNet's layers
                are offloaded one by one.
        """
        self._check_in_place("save_pretrained()")
        if any(getattr(part, "peft_config", None) for part in (self.unet, self.text_encoder)):
            raise ValueError(
                "the model holds LoRA adapters: fuse_lora() and unload_lora_weights(), or "
                "delete_adapters(), before it is saved"
            )
        if self._is_inflated() and (state := self.handle.tuned_state()):
            Cache(save_directory).write(self.settings.recipe.name + TUNED, state)
        # Its constructor would change the scheduler's configuration.
        plain = StableDiffusionPipeline.__new__(StableDiffusionPipeline)
        plain.register_to_config(requires_safety_checker=False)
        absent = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
        with self._plain("save_pretrained()"):
            plain.register_modules(
                vae=self.vae, text_encoder=self.text_encoder, tokenizer=self.tokenizer,
                unet=self.unet, scheduler=self._given_scheduler, **absent,
            )  # fmt: skip
            plain.save_pretrained(save_directory, *args, **kwargs)

    def enable_sequential_cpu_offload(self, *args, **kwargs):
        """Refused: it moves layers one by one, and the kernels read several layers' weights."""
        raise ValueError(
            "layers cannot be offloaded one by one, fused kernels read several at once: "
            "use enable_model_cpu_offload()"
        )

    def _key(self, **parts) -> str:
        """For a cache: the models as they are now, adapters too, and these parts."""
        return content_key(
            version=tvkernels.__version__, torch=torch.__version__, unet=self.unet,
            settings=repr(asdict(self.settings)), **parts,
        )  # fmt: skip

    def _encode_video(self, video, chunk: int) -> Tensor:
        """Frames as latents [F, 4, h, w], float32 or wider."""
        pixels = frames_to_tensor(video, self.multiple)
        latents = encode_frames(self.vae, pixels.to(self._execution_device), chunk)
        self.maybe_free_model_hooks()  # an offloaded VAE stays no longer than it works
        return latents.to(self._wide)

    def _encode_prompts(self, prompts: list[str], clip_skip: int | None = None, **how) -> Tensor:
        if all(isinstance(prompt, str) for prompt in prompts):
            prompts = self.maybe_convert_prompt(prompts, self.tokenizer)
        states = encode_text(self.tokenizer, self.text_encoder, prompts, clip_skip, **how)
        return states.to(self.unet.dtype)

    def _texts(
        self, prompt: str | None, negative_prompt: str | None, prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None, clip_skip: int | None, guided: bool,
    ) -> Tensor:  # fmt: skip
        """Text states [2, L, C] of both halves of guidance, [1, L, C] without; see `__call__`.

        As in diffusers the layers that `clip_skip` leaves out are left out of the prompt alone.

        Raises:
            ValueError: see `check_texts`.
        """
        width = self.unet.config.cross_attention_dim
        check_texts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, width)
        negative = negative_prompt or ""
        if guided and prompt_embeds is None and negative_prompt_embeds is None and not clip_skip:
            return self._encode_prompts([negative, prompt])
        own = prompt_embeds
        if own is None:
            own = self._encode_prompts([prompt], clip_skip)
        if not guided:
            return own.to(self._execution_device, self.unet.dtype)
        other, length = negative_prompt_embeds, own.shape[1]
        if other is None and length > self.tokenizer.model_max_length:
            raise ValueError(
                f"prompt_embeds of {length} tokens: give negative_prompt_embeds of as many"
            )
        if other is None:
            other = self._encode_prompts([negative], length=length)
        if other.shape != own.shape:
            raise ValueError(f"negative_prompt_embeds have {other.shape[1]} tokens, not {length}")
        return torch.cat([x.to(self._execution_device, self.unet.dtype) for x in (other, own)])

    @contextmanager
    def _adapters_at(self, kwargs: dict | None) -> Iterator[None]:
        """Inside, LoRA layers count as `cross_attention_kwargs` has it: {"scale": 0.5}.

        Raises:
            ValueError: other keys, or a scale without a LoRA.
        """
        scale = (kwargs or {}).get("scale", 1.0)
        if set(kwargs or {}) - {"scale"}:
            raise ValueError(f"cross_attention_kwargs take a scale alone, not {sorted(kwargs)}")
        if scale == 1:
            yield
            return
        layers = [layer for part in (self.unet, self.text_encoder) for _, layer in adapted(part)]
        if not layers:
            raise ValueError("a scale in cross_attention_kwargs needs a LoRA: load one first")
        before = [dict(layer.scaling) for layer in layers]
        for layer in layers:
            layer.scale_layer(scale)
        self._start_runtime()
        try:
            yield
        finally:
            for layer, scaling in zip(layers, before, strict=True):
                layer.scaling.update(scaling)
            self._start_runtime()
