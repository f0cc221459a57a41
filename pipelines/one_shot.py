"""One-shot video editing: tune on the clip, invert it, sample with another prompt.

The loop that Tune-A-Video and EI2 share; a method is its `Settings`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

import tvkernels
from tvkernels import guided_ddim_step, inflate
from tvkernels._inflate import is_tuned
from tvkernels._ranges import each_step, span, watch
from tvkernels.pipelines.cache import Cache, adapters, content_key
from tvkernels.pipelines.checks import ModelError, check_unet
from tvkernels.pipelines.common import (
    VideoEditOutput,
    ddim_schedulers,
    ddim_table,
    decode_latents,
    encode_frames,
    encode_text,
    frames_to_tensor,
)
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


class OneShotPipeline(DiffusionPipeline):
    """Edits a clip with an SD-1.x model: `fit`, `invert`, then call with the new prompt.

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
        self._tuned_key: str | None = None
        self.handle = None
        self._runtime: tuple[str, dict] = ("eager", {})
        self._inflate(torch.Generator().manual_seed(0))

    @property
    def multiple(self) -> int:
        """What both sides of a frame, in pixels, must divide by."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` to leave the sampling loop after the step under way."""
        return self._interrupt

    def _inflate(self, generator: torch.Generator | None) -> None:
        if self.handle is not None:
            self.handle.remove()
        self.handle = self._inflated(self.unet, generator)
        self._start_runtime()

    def _inflated(self, unet, generator: torch.Generator | None):
        return inflate(
            unet, self.settings.recipe, backend=self.backend, attention=self.attention,
            generator=generator,
        )  # fmt: skip

    def _start_runtime(self) -> None:
        backend, options = self._runtime
        self.runner = accelerate(self.unet, backend, **options)

    def accelerate(self, runtime: str = "eager", **options) -> OneShotPipeline:
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
            value, self.inverse_scheduler = ddim_schedulers(value)
        other = name == "unet" and self.__dict__.get("handle") and value is not self.unet
        if other:
            if hasattr(value, "_orig_mod"):
                raise ValueError('a compiled UNet cannot be inflated: call accelerate("compile")')
            check_unet(value.config)
            handle = self._inflated(value, torch.Generator().manual_seed(0))
            self.handle.remove()
        super().__setattr__(name, value)
        if other:
            self.handle, self.inverted, self._shape, self._tuned_key = handle, None, None, None
            self._start_runtime()

    def _is_inflated(self) -> bool:
        return getattr(self.unet, "_tvkernels_handle", None) is self.handle

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

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As diffusers has it: a plain SD-1.x model, its UNet as it was loaded.

        What the recipe added and `fit` tuned stands beside it, in a file that `from_pretrained` of
        a pipeline with the same recipe reads and others leave alone.

        Raises:
            ValueError: the UNet holds adapters, which no plain model does.
        """
        if getattr(self.unet, "peft_config", None):
            raise ValueError(
                "the UNet holds LoRA adapters: fuse_lora() and unload_lora(), or "
                "delete_adapters(), before it is saved"
            )
        if not self._is_inflated():
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        state = self.handle.tuned_state()
        if state:
            Cache(save_directory).write(self.settings.recipe.name + TUNED, state)
        self.handle.remove()
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self._inflate(torch.Generator().manual_seed(0))
            self.handle.load_tuned_state(state)
            self.runner.weights_changed()

    def enable_sequential_cpu_offload(self, *args, **kwargs):
        """Refused: it moves layers one by one, and the kernels read several layers' weights."""
        raise ValueError(
            "layers cannot be offloaded one by one, fused kernels read several at once: "
            "use enable_model_cpu_offload()"
        )

    def _encode_video(self, video, chunk: int) -> Tensor:
        pixels = frames_to_tensor(video, self.multiple)
        latents = encode_frames(self.vae, pixels.to(self._execution_device), chunk)
        self.maybe_free_model_hooks()  # an offloaded VAE stays no longer than it works
        return latents.to(self.unet.dtype)

    def fit(
        self,
        video,
        prompt: str,
        *,
        num_steps: int | None = None,
        learning_rate: float | None = None,
        generator: torch.Generator | None = None,
        gradient_checkpointing: bool = False,
        decode_chunk_size: int = 8,
        cache: Cache | None = None,
    ) -> OneShotPipeline:
        """Tunes the recipe's parameters on one clip and its prompt (EI2, eq. 2), from fresh ones.

        Args:
            video: uint8 [F, H, W, 3], PIL images, or float [F, 3, H, W] in [0, 1].
            prompt: what the clip shows.
            num_steps, learning_rate: in place of the settings'.
            generator: draws the added weights, noise and timesteps.
            gradient_checkpointing: less memory, the same result.
            decode_chunk_size: frames the VAE sees at once.
            cache: takes the tuned weights from here if they are there, and keeps them if not.
        Returns:
            The pipeline.
        Raises:
            ValueError: frames that do not fit the model, a float16 model, or steps asked of a
                recipe that tunes nothing.
        """
        steps = self.settings.tune_steps if num_steps is None else num_steps
        if steps and not self.settings.recipe.tuned:
            raise ValueError(f"{self.settings.recipe.name} tunes nothing: leave num_steps out")
        rate = self.settings.learning_rate if learning_rate is None else learning_rate
        if steps and self.unet.dtype == torch.float16:
            raise ValueError("float16 cannot be tuned: load the model with dtype=torch.float32")
        if steps < 0:
            raise ValueError(f"{steps} steps of tuning: ask for 0 or more")
        if self._is_inflated():
            self.handle.check()
        latents = self._encode_video(video, decode_chunk_size)
        # Until it is tuned to its end.
        key = self._tuned_key = self.inverted = self._shape = None
        self.handle.remove()
        try:
            if cache is not None:
                key = self._content_key(latents, prompt, steps, rate, generator)
        finally:
            self._inflate(generator)
        state = cache.load(key) if steps and cache is not None else None
        if state is not None:
            self.handle.load_tuned_state(state)
            self.runner.weights_changed()
        elif steps:
            if gradient_checkpointing:
                self.unet.enable_gradient_checkpointing()
            try:
                self._tune(latents, prompt, steps, rate, generator)
                if cache is not None:
                    cache.save(key, self.handle.tuned_state())
            finally:
                if gradient_checkpointing:
                    self.unet.disable_gradient_checkpointing()
                self.unet.eval()
                self.runner.weights_changed()
        self._shape, self._tuned_key = latents.shape, key
        return self

    def _content_key(self, latents, prompt, steps, rate, generator) -> str:
        """Everything tuned weights depend on, taken while the UNet is as it was loaded."""
        seed = torch.Generator().get_state() if generator is None else generator.get_state()
        return content_key(
            version=tvkernels.__version__, torch=torch.__version__, latents=latents, prompt=prompt,
            steps=steps, rate=rate, seed=seed, settings=repr(asdict(self.settings)),
            unet=self.unet, text_encoder=self.text_encoder, vae=self.vae,
            schedule=self.scheduler.alphas_cumprod,
        )  # fmt: skip

    def _tune(self, latents: Tensor, prompt: str, steps: int, rate: float, generator) -> None:
        device, frames = latents.device, latents.shape[0]
        text = self._encode_prompts([prompt])
        if not any(is_tuned(f"attn2.to_{kind}", self.settings.recipe) for kind in "kv"):
            text = self.runner.text(text)
        parameters = list(self.handle.tuned_parameters().values())
        # In bfloat16 most updates are smaller than the weight's last bit: they add up in float32.
        wide = [p if p.dtype != torch.bfloat16 else p.detach().float() for p in parameters]
        narrow = [(p, copy) for p, copy in zip(parameters, wide, strict=True) if copy is not p]
        optimizer = torch.optim.AdamW(wide, lr=rate, weight_decay=self.settings.weight_decay)
        self.unet.train()
        last = self.scheduler.config.num_train_timesteps
        with span("method", "tune"), self.progress_bar(total=steps) as bar:
            for _ in each_step(range(steps)):
                draw = device if generator is None else generator.device
                t = torch.randint(last, (1,), generator=generator, device=draw).to(device)
                noise = randn_tensor(latents.shape, generator, device, latents.dtype)
                noisy = self.scheduler.add_noise(latents, noise, t)
                loss = F.mse_loss(self._unet(noisy, t, text, frames).float(), noise.float())
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                for parameter, copy in narrow:
                    if parameter.grad is not None:
                        copy.grad, parameter.grad = parameter.grad.float(), None
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                with torch.no_grad():
                    for parameter, copy in narrow:
                        parameter.copy_(copy)
                bar.set_postfix(loss=f"{loss.item():.4f}")
                bar.update()

    @torch.no_grad()
    def invert(
        self,
        video,
        *,
        num_inference_steps: int | None = None,
        decode_chunk_size: int = 8,
        cache: Cache | None = None,
    ) -> Tensor:
        """DDIM inversion of a clip under the tuned UNet, without guidance.

        Args:
            video: as for `fit`.
            num_inference_steps: in place of the settings'; sample with the same number.
            decode_chunk_size: frames the VAE sees at once.
            cache: as for `fit`; used where `fit` used one.
        Returns:
            The noise [F, 4, h, w] from which sampling starts, also kept as `inverted`.
        """
        self._check_inflated()
        steps = self.settings.steps if num_inference_steps is None else num_inference_steps
        latents = self._encode_video(video, decode_chunk_size)
        timesteps, rows = ddim_table(self.inverse_scheduler, steps, 1.0, latents.device)
        key = None
        if cache is not None and self._tuned_key is not None:
            key = content_key(
                tuned=self._tuned_key, latents=latents, times=timesteps, rows=rows,
                adapters=adapters(self.unet),
            )  # fmt: skip
            kept = cache.load(key)
            if kept is not None:
                self.inverted = kept["latents"].to(latents)
                return self.inverted
        text = self.runner.text(self._encode_prompts([self.settings.inversion_prompt]))
        times = self.runner.times(timesteps)
        with span("method", "invert"), self.progress_bar(total=steps) as bar:
            for time, row in each_step(zip(times, rows, strict=True)):
                noise = self.runner(latents, time, text, return_dict=False)[0]
                latents = guided_ddim_step(latents, noise, row)
                bar.update()
        if key is not None:
            cache.save(key, {"latents": latents})
        self.inverted = latents
        return latents

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        *,
        video=None,
        latents: Tensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        decode_chunk_size: int = 8,
        split_guidance: bool = False,
    ) -> VideoEditOutput | tuple:
        """Samples the edited clip.

        Args:
            prompt: what the edited clip shall show.
            video: a clip to invert first.
            latents: [F, 4, h, w] start noise; none takes what `invert` left, else fresh noise for
                the clip that `fit` saw.
            num_inference_steps, guidance_scale: in place of the settings'; guidance 1 or less
                samples without the unconditional half.
            negative_prompt: what the unconditional half is told; None tells it nothing.
            generator: draws that fresh noise; DDIM itself draws nothing.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: a `VideoEditOutput`, else a tuple of its frames.
            callback_on_step_end: called as f(pipe, step, timestep, tensors) after each step; what
                it returns under the same names takes effect.
            callback_on_step_end_tensor_inputs: names out of `_callback_tensor_inputs`.
            decode_chunk_size: frames the VAE sees at once.
            split_guidance: the unconditional and the conditional half in two calls of the UNet:
                half the activations, the same result but for rounding. The demo's edit of 8
                frames of 128 x 128 took 1.035 times as long (one CPU thread, medians of 5).
        Raises:
            ValueError: nothing to start from, or unknown callback inputs or output type.
        """
        wanted = self._check_call(
            callback_on_step_end, callback_on_step_end_tensor_inputs, output_type
        )
        steps = self.settings.steps if num_inference_steps is None else num_inference_steps
        guidance = self.settings.guidance if guidance_scale is None else guidance_scale
        if video is not None:
            latents = self.invert(
                video, num_inference_steps=steps, decode_chunk_size=decode_chunk_size
            )
        latents = self.inverted if latents is None else latents
        if latents is None:
            if self._shape is None:
                raise ValueError("nothing to edit: pass video= or latents=, or invert() first")
            latents = randn_tensor(self._shape, generator, self._execution_device)
        self._interrupt, self.num_timesteps = False, steps
        guided = guidance > 1
        prompts = [negative_prompt or "", prompt] if guided else [prompt]
        prompt_embeds = self._encode_prompts(prompts)
        latents = latents.to(self._execution_device, prompt_embeds.dtype)
        timesteps, rows = ddim_table(self.scheduler, steps, guidance, latents.device)
        times, text = self.runner.times(timesteps), None
        with span("method", "sample"), self.progress_bar(total=steps) as bar:
            for i, t in enumerate(each_step(timesteps)):
                if self.interrupt:
                    continue
                if text is None:
                    text = self.runner.text(prompt_embeds)
                latents = self._update(i, latents, times[i], text, rows[i], split_guidance)
                if callback_on_step_end is not None:
                    latents, prompt_embeds = self._call_back(
                        callback_on_step_end, wanted, i, t,
                        latents=latents, prompt_embeds=prompt_embeds,
                    )  # fmt: skip
                    text = None if "prompt_embeds" in wanted else text  # it may be another
                bar.update()
        frames = self._decode(latents, output_type, decode_chunk_size)
        self.maybe_free_model_hooks()
        return VideoEditOutput(frames=frames) if return_dict else (frames,)

    def _check_call(self, callback, wanted: Sequence[str], output_type: str) -> Sequence[str]:
        """The tensors that the callback is given: diffusers' own callbacks name theirs."""
        self._check_inflated()
        wanted = getattr(callback, "tensor_inputs", wanted)
        unknown = set(wanted) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback inputs {sorted(unknown)} are not among {self._callback_tensor_inputs}"
            )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"unknown output_type {output_type!r}: use pil, np, pt or latent")
        return wanted

    def _call_back(self, callback: Callable, wanted: Sequence[str], i: int, t, **tensors) -> list:
        """The tensors after step i, in their order: what the callback gave, or as they were."""
        changed = callback(self, i, t, {name: tensors[name] for name in wanted}) or {}
        return [changed.get(name, tensor) for name, tensor in tensors.items()]

    def _update(
        self, i: int, latents: Tensor, time: Tensor, text: Tensor, row: Tensor, split: bool
    ) -> Tensor:
        """Step i of sampling; what methods that do more than guidance have of their own."""
        return guided_ddim_step(latents, self._predict(latents, time, text, split)[0], row)

    def _predict(
        self, latents: Tensor, time: Tensor, text: Tensor, split: bool = False, **looks
    ) -> tuple[Tensor, Tensor | None]:
        """The noise [B * F, 4, h, w] in one latent [F, 4, h, w] under B texts.

        With `tokens` and `levels`, the runner's, also their maps under the last text.
        """
        looks |= {"cross_attention_kwargs": {"num_frames": len(latents)}, "return_dict": False}
        texts = text.split(1) if split else (text,)
        parts = [self.runner(latents, time, part, **looks) for part in texts]
        noise = torch.cat([part[0] for part in parts]) if split else parts[0][0]
        return noise, parts[-1][1] if parts[-1][1:] else None

    def _decode(self, latents: Tensor, output_type: str, chunk: int):
        if output_type == "latent":
            return latents
        return self._present(decode_latents(self.vae, latents, chunk)[None], output_type)

    def _present(self, pixels: Tensor, output_type: str):
        """Pixels [1, F, 3, H, W] in [0, 1] as asked for: themselves, PIL images or an array."""
        if output_type == "pt":
            return pixels
        return self.video_processor.postprocess_video(
            pixels.transpose(1, 2) * 2 - 1, output_type=output_type
        )

    def _encode_prompts(self, prompts: list[str]) -> Tensor:
        return encode_text(self.tokenizer, self.text_encoder, prompts).to(self.unet.dtype)

    def _unet(self, latents: Tensor, t: Tensor, text: Tensor, frames: int) -> Tensor:
        return self.unet(
            latents,
            t,
            encoder_hidden_states=text,
            cross_attention_kwargs={"num_frames": frames},
            return_dict=False,
        )[0]
