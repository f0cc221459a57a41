"""One-shot video editing: tune on the clip, invert it, sample with another prompt.

The loop that Tune-A-Video and EI2 share; a method is its `Settings`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tvkernels import guided_ddim_step
from tvkernels._inflate import is_tuned
from tvkernels._ranges import each_step, span
from tvkernels.pipelines.cache import Cache
from tvkernels.pipelines.common import (
    VideoEditOutput,
    ddim_table,
    decode_latents,
    widened,
    working,
)
from tvkernels.pipelines.model import InflatedPipeline, Settings
from tvkernels.pipelines.text import check_texts

__all__ = ["OneShotPipeline", "Settings"]


class OneShotPipeline(InflatedPipeline):
    """Edits a clip with an SD-1.x model: `fit`, `invert`, then call with the new prompt.

    Further prompts on the same clip need neither `fit` nor `invert` again. The arguments are
    those of `InflatedPipeline`.
    """

    @working(gradients=True)
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
        self._check_in_place("fit()")
        latents = self._encode_video(video, decode_chunk_size)
        text = self._encode_prompts([prompt]) if steps else None
        key = self.inverted = self._shape = None  # until it is tuned to its end
        self._deflate()
        try:
            if steps and cache is not None:
                seed = torch.Generator() if generator is None else generator
                key = self._key(
                    latents=latents, text=text, steps=steps, rate=rate, seed=seed.get_state(),
                    schedule=self.scheduler.alphas_cumprod,
                )  # fmt: skip
        finally:
            self._inflate(generator)
        state = None if key is None else cache.load(key)
        if state is not None:
            self.handle.load_tuned_state(state)
            self.runner.weights_changed()
        elif steps:
            if gradient_checkpointing:
                self.unet.enable_gradient_checkpointing()
            try:
                self._tune(latents, text, steps, rate, generator)
                if key is not None:
                    cache.save(key, self.handle.tuned_state())
            finally:
                if gradient_checkpointing:
                    self.unet.disable_gradient_checkpointing()
                self.unet.eval()
                self.runner.weights_changed()
        self._shape = latents.shape
        return self

    def _tune(self, latents: Tensor, text: Tensor, steps: int, rate: float, generator) -> None:
        device, frames = latents.device, latents.shape[0]
        if not any(is_tuned(f"attn2.to_{kind}", self.settings.recipe) for kind in "kv"):
            text = self.runner.text(text)
        parameters = list(self.handle.tuned_parameters().values())
        # In bfloat16 most updates are smaller than the weight's last bit: they add up in float32.
        # An offloaded UNet is elsewhere yet, its gradients will be on the device.
        wide = [
            p if p.dtype != torch.bfloat16 else p.detach().to(device, torch.float32)
            for p in parameters
        ]
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
                found = self._unet(noisy.to(text.dtype), t, text, frames)
                loss = F.mse_loss(found.float(), noise.float())
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

    @working()
    def invert(
        self,
        video,
        *,
        num_inference_steps: int | None = None,
        decode_chunk_size: int = 8,
        cache: Cache | None = None,
        prompt_embeds: Tensor | None = None,
        clip_skip: int | None = None,
        cross_attention_kwargs: dict | None = None,
    ) -> Tensor:
        """DDIM inversion of a clip under the tuned UNet, without guidance.

        Args:
            video: as for `fit`.
            num_inference_steps: in place of the settings'; sample with the same number.
            decode_chunk_size: frames the VAE sees at once.
            cache: takes the noise from here if it is there, and keeps it if not.
            prompt_embeds: [1, L, C], instead of the settings' inversion prompt.
            clip_skip, cross_attention_kwargs: as for a call.
        Returns:
            The noise [F, 4, h, w], float32, from which sampling starts, also kept as `inverted`.
        """
        self._check_inflated()
        steps = self.settings.steps if num_inference_steps is None else num_inference_steps
        latents = self._encode_video(video, decode_chunk_size)
        timesteps, rows = ddim_table(self.inverse_scheduler, steps, 1.0, latents.device)
        prompt = self.settings.inversion_prompt if prompt_embeds is None else None
        with self._adapters_at(cross_attention_kwargs):
            states = self._texts(prompt, None, prompt_embeds, None, clip_skip, False)
            key = None
            if cache is not None:
                key = self._key(latents=latents, times=timesteps, rows=rows, text=states)
                kept = cache.load(key)
                if kept is not None:
                    self.inverted = kept["latents"].to(latents)
                    return self.inverted
            text, times = self.runner.text(states), self.runner.times(timesteps)
            with span("method", "invert"), self.progress_bar(total=steps) as bar:
                for time, row in each_step(zip(times, rows, strict=True)):
                    noise = self._predict(latents, time, text)[0]
                    latents = guided_ddim_step(latents, noise, row)
                    bar.update()
        if key is not None:
            cache.save(key, {"latents": latents})
        self.inverted = latents
        return latents

    @working()
    def __call__(
        self,
        prompt: str | None = None,
        *,
        video=None,
        latents: Tensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        clip_skip: int | None = None,
        cross_attention_kwargs: dict | None = None,
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
            prompt_embeds, negative_prompt_embeds: [1, L, C] text states instead of the prompts.
            clip_skip: layers of the text encoder that are left out at its end, for the prompt.
            cross_attention_kwargs: {"scale": s}, how much LoRA layers count in this call.
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
            ValueError: nothing to start from, unknown callback inputs or output type, or a prompt
                that is given twice or not at all.
        """
        wanted = self._check_call(
            callback_on_step_end, callback_on_step_end_tensor_inputs, output_type
        )
        steps = self.settings.steps if num_inference_steps is None else num_inference_steps
        guidance = self.settings.guidance if guidance_scale is None else guidance_scale
        texts = (prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        check_texts(*texts, self.unet.config.cross_attention_dim)
        self._check_latents(latents)
        if video is not None:
            latents = self.invert(
                video, num_inference_steps=steps, decode_chunk_size=decode_chunk_size,
                clip_skip=clip_skip, cross_attention_kwargs=cross_attention_kwargs,
            )  # fmt: skip
        latents = self.inverted if latents is None else latents
        if latents is None:
            if self._shape is None:
                raise ValueError("nothing to edit: pass video= or latents=, or invert() first")
            latents = randn_tensor(self._shape, generator, self._execution_device)
        self._interrupt, self.num_timesteps = False, steps
        latents = latents.to(self._execution_device, self._wide)
        timesteps, rows = ddim_table(self.scheduler, steps, guidance, latents.device)
        with self._adapters_at(cross_attention_kwargs):
            prompt_embeds = self._texts(*texts, clip_skip, guidance > 1)
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

    def _check_latents(self, latents: Tensor | None) -> None:
        channels = self.unet.config.in_channels
        if latents is not None and (latents.dim() != 4 or latents.shape[1] != channels):
            raise ValueError(
                f"latents of {tuple(latents.shape)}: give one clip's [F, {channels}, h, w]"
            )

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
        """The noise [B * F, 4, h, w] in one latent [F, 4, h, w] under B texts, float32 or wider.

        Only the UNet works in its own dtype. With `tokens` and `levels`, the runner's, also their
        maps under the last text.
        """
        looks |= {"cross_attention_kwargs": {"num_frames": len(latents)}, "return_dict": False}
        texts = text.split(1) if split else (text,)
        given = latents.to(self.unet.dtype)
        parts = [self.runner(given, time, part, **looks) for part in texts]
        noise = torch.cat([part[0] for part in parts]) if split else parts[0][0]
        return widened(noise), parts[-1][1] if parts[-1][1:] else None

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

    def _unet(self, latents: Tensor, t: Tensor, text: Tensor, frames: int) -> Tensor:
        return self.unet(
            latents,
            t,
            encoder_hidden_states=text,
            cross_attention_kwargs={"num_frames": frames},
            return_dict=False,
        )[0]
