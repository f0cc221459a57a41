"""StableVideo: key frames edited one after the other and joined in an atlas (ICCV 2023).

`fit` takes the clip apart into atlases; a call edits each foreground in a few key frames, carries
every edit through the atlas into the next one, and the background's atlas as one image. Nothing of
the model is tuned or inverted. The outlines stay those of the clip: an edit changes what an object
looks like, not its silhouette.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

import tvkernels
from tvkernels import atlas_composite, atlas_sample, atlas_splat, guided_ddim_step
from tvkernels._ranges import each_step, span
from tvkernels.atlas import AtlasSettings, LayeredAtlas, train_atlas
from tvkernels.atlas.files import from_state
from tvkernels.atlas.keys import aggregate, key_frames, median, texels_seen
from tvkernels.atlas.train import filled
from tvkernels.pipelines.cache import Cache, content_key
from tvkernels.pipelines.checks import latent_side
from tvkernels.pipelines.common import (
    VideoEditOutput,
    ddim_table,
    frames_to_tensor,
    widened,
    working,
)
from tvkernels.pipelines.guides import hint_made
from tvkernels.pipelines.one_shot import OneShotPipeline
from tvkernels.pipelines.one_shot import Settings as OneShotSettings
from tvkernels.recipes import FRAME_BY_FRAME

PROPAGATION = ("atlas", "sequential", "fixed", "random")
AGGREGATION = ("network", "median")


@dataclass(frozen=True)
class Settings(OneShotSettings):
    """The method's numbers, beside those that every method has.

    Args:
        strength: t0, the share of the noise that a propagated key frame gets (eq. 6).
        first: the same for the first key frame and the background without a ControlNet; under one
            they start from noise alone (eq. 4).
        every: frames from one key frame to the next; at least three are taken.
        overlap: share of a key frame's texels that the one before must show, else the frame in the
            middle between them becomes one too.
        propagation: how key frames are edited, the ways of figure 11: "atlas" (the method),
            "sequential" (image to image from the edited key frame before), "fixed" (each by
            itself, from the same noise) or "random" (from noise of its own).
        aggregation: "network" (eq. 7) or "median" of the partial atlases.
        canny: lower and upper threshold of the edges.
        atlas: numbers of the atlas's training.
    """

    strength: float = 0.8
    first: float = 0.8
    every: int = 20
    overlap: float = 0.5
    propagation: str = "atlas"
    aggregation: str = "network"
    canny: tuple[int, int] = (100, 200)
    atlas: AtlasSettings = field(default_factory=AtlasSettings)


# Paper, section 4.1 and supplement A: 50 to 70 frames, DDIM 20, t0 0.8 (its code: 0.9), a key
# frame every 20, canny at 100 and 200; guidance 9 is the code's. Without a ControlNet the noise of
# eq. 6 is the picture's own DDIM inversion, which is ours: of scenes 1, 2 and 6 of the shapes
# world at t0 0.8, fresh noise lost the object in all three, inverted noise in one. Outside of the
# layer its code denoises freely and drops the result by alpha (eq. 4); here the latents are held
# to the key frame's own there, so that the layer is edited beside what it stands before.
SETTINGS = Settings(
    recipe=replace(
        FRAME_BY_FRAME,
        name="stable-video",
        source="StableVideo, ICCV 2023; github.com/rese1f/StableVideo app.py",
    ),
    frames=70,
    tune_steps=0,
    learning_rate=0.0,
    weight_decay=0.0,
    steps=20,
    guidance=9.0,
)


class StableVideoPipeline(OneShotPipeline):
    """Edits a clip through its layered atlas: `fit`, then call with the new prompt.

    Args:
        vae, text_encoder, tokenizer, unet, scheduler, settings, backend, attention: as for
            `OneShotPipeline`.
        controlnet_canny: diffusers' `ControlNetModel` for the foreground's key frames, or None.
        controlnet_depth: the same for the background, or None; needs `depth_estimator`.
        depth_estimator: of transformers, [1, 3, H, W] -> `predicted_depth` [1, h, w], near is
            large.
        depth_processor: the image processor that goes before it; without, it takes a picture of
            any size in [-1, 1].

    Attributes:
        atlas: what `fit` left.
        in_pixels: results are composed in pixels; "latent" encodes them again.
    """

    in_pixels = True
    settings = SETTINGS

    def __init__(
        self, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel, scheduler: KarrasDiffusionSchedulers, settings=None,
        backend="auto", attention=None, controlnet_canny=None, controlnet_depth=None,
        depth_estimator=None, depth_processor=None,
    ):  # fmt: skip
        super().__init__(
            vae, text_encoder, tokenizer, unet, scheduler, settings, backend, attention
        )
        if controlnet_depth is not None and depth_estimator is None:
            raise ValueError("controlnet_depth needs a depth_estimator, which makes its maps")
        for name, chosen, known in (
            ("propagation", self.settings.propagation, PROPAGATION),
            ("aggregation", self.settings.aggregation, AGGREGATION),
        ):
            if chosen not in known:
                raise ValueError(f"unknown {name} {chosen!r}: use one of {', '.join(known)}")
        self.controlnets = {"canny": controlnet_canny, "depth": controlnet_depth}
        self.depth_estimator, self.depth_processor = depth_estimator, depth_processor
        self.atlas: LayeredAtlas | None = None
        self._pixels: Tensor | None = None
        self._seed = 0

    def _gather(self) -> None:
        """Brings what is no component of a pipeline to where it runs: guides and atlas."""
        device = self._execution_device
        for module in (*self.controlnets.values(), self.depth_estimator):
            if module is not None:
                module.to(device, self.unet.dtype)
        self.atlas, self._pixels = self.atlas.to(device), self._pixels.to(device)

    def what_guides(self) -> str:
        """One line: what holds the structure of each part's edit."""
        kept = "SDEdit, noised by the picture's own DDIM inversion (no ControlNet is given)"
        parts = (("foreground", "canny", "edges"), ("background", "depth", "depth"))
        return "; ".join(
            f"{part}: {kept if self.controlnets[kind] is None else f'ControlNet on {what}'}"
            for part, kind, what in parts
        )

    @working(gradients=True)
    def fit(
        self,
        video,
        prompt: str = "",
        *,
        num_steps: int | None = None,
        learning_rate: float | None = None,
        generator: torch.Generator | None = None,
        gradient_checkpointing: bool = False,
        decode_chunk_size: int = 8,
        cache: Cache | None = None,
        masks: Sequence[np.ndarray] | None = None,
        atlas: LayeredAtlas | None = None,
    ) -> StableVideoPipeline:
        """Trains the clip's atlas, or takes it from the cache.

        Args:
            video: uint8 [F, H, W, 3], PIL images, or float [F, 3, H, W] in [0, 1].
            prompt, decode_chunk_size: of methods that read them; an atlas is trained on pixels.
            num_steps, learning_rate: 0 or None, because nothing of the model is tuned;
                `settings.atlas` has the atlas's own.
            gradient_checkpointing: False, because nothing of the model is tuned.
            generator: draws the training's pixels.
            cache: takes the atlas from here if it is there, and keeps it if not.
            masks: bool [F, H, W] of each foreground layer, the front one first; None finds what
                moves unlike the background.
            atlas: one that was made before, of this clip.
        Returns:
            The pipeline.
        Raises:
            ValueError: frames that do not fit the model or the atlas, or steps of a tuning.
            VideoError: the clip's optical flow fails, or nothing moves.
        """
        asked = {"num_steps": num_steps, "learning_rate": learning_rate,
                 "gradient_checkpointing": gradient_checkpointing}  # fmt: skip
        for name in (name for name, value in asked.items() if value):
            raise ValueError(f"{self.settings.recipe.name} tunes nothing: leave {name} out")
        pixels = frames_to_tensor(video, self.multiple).div(2).add(0.5)
        frames = pixels.mul(255).round().byte().permute(0, 2, 3, 1).contiguous()
        if atlas is not None and atlas.shape != tuple(frames.shape[:3]):
            raise ValueError(f"the atlas is of [F, H, W] {atlas.shape}, not {frames.shape[:3]}")
        key, state = None, None
        if atlas is None and cache is not None:
            seed = torch.Generator().get_state() if generator is None else generator.get_state()
            marks = None if masks is None else torch.from_numpy(np.stack(masks))
            key = content_key(
                version=tvkernels.__version__, torch=torch.__version__, frames=frames, masks=marks,
                atlas=repr(asdict(self.settings.atlas)), seed=seed,
            )  # fmt: skip
            state = cache.load(key)
        device = self._execution_device
        if state is not None:
            atlas = from_state(state)
        elif atlas is None:
            numbers = self.settings.atlas.of(*frames.shape[:3])
            with self.progress_bar(total=numbers.steps) as bar:
                atlas = train_atlas(
                    frames.numpy(), masks, numbers, generator=generator, device=device,
                    on_step=lambda step, loss: bar.update(),
                )  # fmt: skip
            if key is not None:
                cache.save(key, atlas.state_dict())
        self.atlas, self._pixels = atlas.to(device), pixels.to(device)
        self._seed = 0 if generator is None else generator.initial_seed()
        self._shape, self.inverted = None, None
        return self

    def invert(
        self, video, *, num_inference_steps=None, decode_chunk_size=8, cache=None
    ) -> Tensor:
        """The clip's latents [F, 4, h, w]: this method adds noise to them and inverts nothing."""
        return self._encode_video(video, decode_chunk_size)

    @working()
    def __call__(
        self,
        prompt: str = "",
        *,
        foreground_prompt: str | Sequence[str] | None = None,
        background_prompt: str | None = None,
        video=None,
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
        """Edits the clip that `fit` saw.

        Args:
            prompt: what the foregrounds shall be, where `foreground_prompt` says nothing.
            foreground_prompt: for all foreground layers, or one for each; "" leaves a layer.
            background_prompt: what the background shall be; None or "" leaves it as it is.
            video: a clip to fit first, without a cache.
            prompt_embeds: [1, L, C], instead of a prompt for the foregrounds.
            num_inference_steps, guidance_scale, negative_prompt, negative_prompt_embeds,
                clip_skip, cross_attention_kwargs, output_type, return_dict, callback_on_step_end,
                callback_on_step_end_tensor_inputs, decode_chunk_size, split_guidance: as for
                `OneShotPipeline`; steps are counted over all edited images.
            generator: draws the noise; None takes a fresh one of the seed that `fit` was given.
        Raises:
            ValueError: nothing fitted, a number of prompts other than of layers, or unknown
                callback inputs or output type.
        """
        wanted = self._check_call(
            callback_on_step_end, callback_on_step_end_tensor_inputs, output_type
        )
        if video is not None:
            self.fit(video, generator=generator)
        if self.atlas is None:
            raise ValueError("nothing to edit: pass video=, or fit() a clip first")
        self._gather()
        count = len(self.atlas.logits)
        told = prompt if foreground_prompt is None else foreground_prompt
        if prompt_embeds is not None and told:
            raise ValueError("give either prompt_embeds or prompts of the foregrounds")
        told = told if prompt_embeds is None else [prompt_embeds] * count
        told = [told] * count if isinstance(told, str) else list(told)
        if len(told) != count:
            raise ValueError(f"{len(told)} foreground prompts for {count} foreground layers")
        self._interrupt = False
        if generator is None:
            generator = torch.Generator().manual_seed(self._seed)
        job = _Job(
            self,
            self.settings.steps if num_inference_steps is None else num_inference_steps,
            self.settings.guidance if guidance_scale is None else guidance_scale,
            negative_prompt, generator, callback_on_step_end, wanted, split_guidance,
            negative_prompt_embeds, clip_skip,
        )  # fmt: skip
        with self._adapters_at(cross_attention_kwargs):
            edited = {
                i: self._edit_layer(i, job.texts(text), job)
                for i, text in enumerate(told)
                if not isinstance(text, str) or text
            }
            if background_prompt:
                edited[count] = self._edit_background(job.texts(background_prompt), job)
        pixels = self.atlas.render(edited)
        self.maybe_free_model_hooks()
        if output_type == "latent":
            frames = self._encode_video(pixels, decode_chunk_size)
        else:
            frames = self._present(pixels[None], output_type)
        return VideoEditOutput(frames=frames) if return_dict else (frames,)

    def _edit_layer(self, layer: int, text: Tensor, job: _Job) -> Tensor:
        """A foreground's edited atlas [H, W, 3], from its key frames (section 3.2 and 3.3)."""
        model = self.atlas
        uv, alpha = model.uv_maps(layer), model.alphas()[layer].flatten(1)
        size = model.layers[layer].size
        keys = key_frames(uv, alpha, size, self.settings.every, self.settings.overlap)
        guided = self.controlnets["canny"] is not None
        edits, partial, covers = [], [], []
        for number, f in enumerate(keys):
            own, way = self._pixels[f], self.settings.propagation
            start, strength = own, 1.0 if guided else self.settings.first
            if way in ("fixed", "random") and not guided:
                strength = self.settings.strength
            if number and way == "sequential":
                start, strength = edits[-1], self.settings.strength
            elif number and way == "atlas":
                # Eq. 5; what the key frame before did not show, and the rest of the picture, is
                # the frame's own: the paper's black is nothing that the model has seen.
                before = keys[number - 1]
                seen = texels_seen(covers[-1], uv[before], alpha[before], own.shape[1:])
                colors = filled(partial[-1], covers[-1])
                start = self._carried(own, uv[f], alpha[f], colors, seen)
                strength = self.settings.strength
            noise = None
            if guided or way in ("fixed", "random"):
                noise = job.noise(own, fresh=way != "fixed")
            condition = self._edges(own, alpha[f])
            edit = job.edit(start, noise, text, strength, "canny", condition, alpha[f])
            picture, cover = atlas_splat(
                _points(edit)[None], uv[f][None], size, weight=alpha[f][None]
            )
            edits.append(edit)
            partial.append(picture[0])
            covers.append(cover[0])
        colors = median(partial, covers)
        if self.settings.aggregation == "network":
            targets = torch.stack([_points(edit) for edit in edits])
            colors = aggregate(colors, partial, targets, uv[keys], alpha[keys])
        return filled(colors, torch.stack(covers).sum(0))

    def _carried(self, own, uv, alpha, picture, seen) -> Tensor:
        """The edit before, mapped through its partial atlas into this frame, [3, H, W]."""
        marked = torch.cat([picture, seen.to(picture)[..., None]], 2)
        shown = atlas_sample(marked[None], uv[None])
        seen = (shown[..., 3] > 0.999).to(alpha) * alpha[None]
        layers = torch.stack([shown[..., :3], _points(own)[None]], 1)
        return atlas_composite(layers, seen[:, None])[0].T.unflatten(1, own.shape[1:])

    def _edit_background(self, text: Tensor, job: _Job) -> Tensor:
        """The background's atlas, edited as one image at about the model's own size."""
        picture = self.atlas.layers[-1].colors.permute(2, 0, 1)
        side = latent_side(self.unet.config) * self.multiple
        units = side / min(picture.shape[1:]) / self.multiple
        h, w = (max(1, round(n * units)) * self.multiple for n in picture.shape[1:])
        image = F.interpolate(picture[None], (h, w), mode="bilinear", antialias=True)[0]
        guided = self.controlnets["depth"] is not None
        edit = job.edit(
            image, job.noise(image) if guided else None, text,
            1.0 if guided else self.settings.first, "depth", self._depth(image),
        )  # fmt: skip
        edit = F.interpolate(edit[None], picture.shape[1:], mode="bilinear", antialias=True)
        return edit[0].permute(1, 2, 0)

    def _edges(self, picture: Tensor, alpha: Tensor) -> Tensor | None:
        """Canny edges of the layer, [1, 3, H, W]."""
        if self.controlnets["canny"] is None:
            return None
        from tvkernels.video.flow import opencv

        shown = (picture * alpha.view(picture.shape[1:])).mul(255).round().byte()
        edges = opencv().Canny(shown.permute(1, 2, 0).cpu().numpy(), *self.settings.canny)
        return torch.from_numpy(edges).to(picture).div(255)[None, None].repeat(1, 3, 1, 1)

    def _depth(self, picture: Tensor) -> Tensor | None:
        """Depth of a picture, near is bright, [1, 3, H, W]."""
        if self.controlnets["depth"] is None:
            return None
        given = picture[None] * 2 - 1
        if self.depth_processor is not None:
            shown = picture.mul(255).round().byte().cpu()
            given = self.depth_processor(images=shown, return_tensors="pt").pixel_values
        given = given.to(picture.device, self.unet.dtype)
        depth = self.depth_estimator(given).predicted_depth[:, None].float()
        depth = F.interpolate(depth, picture.shape[1:], mode="bicubic")
        low, high = depth.amin(), depth.amax()
        return ((depth - low) / (high - low).clamp(min=1e-6)).repeat(1, 3, 1, 1)


@dataclass
class _Job:
    """What all images of one call share."""

    pipe: StableVideoPipeline
    steps: int
    guidance: float
    negative: str | None
    generator: torch.Generator | None
    callback: Callable | None
    wanted: Sequence[str]
    split: bool
    negative_embeds: Tensor | None = None
    clip_skip: int | None = None
    done: int = 0
    kept: Tensor | None = None

    def texts(self, prompt: str | Tensor) -> Tensor:
        """Text states of both halves of guidance, of a prompt or of its states."""
        told = (None, self.negative, prompt) if isinstance(prompt, Tensor) else (
            prompt, self.negative, None
        )  # fmt: skip
        guided = self.guidance > 1
        return self.pipe._texts(*told, self.negative_embeds, self.clip_skip, guided)

    def noise(self, picture: Tensor, fresh: bool = True) -> Tensor:
        """Noise of a picture's latent; not `fresh`, the same as before."""
        k = self.pipe.multiple
        shape = (1, 4, picture.shape[1] // k, picture.shape[2] // k)
        if fresh or self.kept is None or self.kept.shape != shape:
            self.kept = randn_tensor(shape, self.generator, picture.device, self.pipe._wide)
        return self.kept

    def edit(
        self, picture: Tensor, noise: Tensor | None, prompt_embeds: Tensor, strength: float,
        kind: str, condition: Tensor | None, alpha: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Noises a picture [3, H, W] in [0, 1] to t0 and denoises it under a prompt (eq. 6).

        Without `noise` its DDIM inversion takes the place of eq. 6.
        Where the layer is not, by `alpha`, the latents are held to the picture's own.
        """
        clean = self.pipe._encode_video(picture[None], 1)
        mask = None
        if alpha is not None:
            whole = alpha.view(1, 1, *picture.shape[1:])
            mask = F.max_pool2d(F.adaptive_max_pool2d(whole, clean.shape[2:]), 3, 1, 1) > 0.5
        count = max(1, min(self.steps, round(self.steps * strength)))
        if noise is None:
            levels = self.inverted(clean, count)
        else:
            _, rows = ddim_table(self.pipe.scheduler, self.steps, self.guidance, clean.device)
            levels = [clean] + [self._at(clean, noise, row[0]) for row in reversed(rows[-count:])]
            if strength == 1:
                levels[-1] = noise
        latents = self.denoise(levels, prompt_embeds, kind, condition, mask)
        return self.pipe._decode(latents, "pt", 1)[0, 0]

    def denoise(
        self, levels: list[Tensor], prompt_embeds: Tensor, kind: str = "canny",
        condition: Tensor | None = None, mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Samples a latent in the last of the steps.

        Args:
            levels: [1, 4, h, w] each, the clean one and then one for each step, the noisiest last.
            prompt_embeds: of `texts`.
            kind: of the ControlNet.
            condition: [1, 3, H, W], what it reads.
            mask: bool [1, 1, h, w]; outside the latents are held to `levels`.
        """
        pipe, net = self.pipe, self.pipe.controlnets[kind]
        *levels, latents = levels
        first = self.steps - len(levels)
        timesteps, rows = ddim_table(pipe.scheduler, self.steps, self.guidance, latents.device)
        hint = None
        if net is not None:
            hint = net.controlnet_cond_embedding(condition.to(net.dtype))
        times, text = pipe.runner.times(timesteps), None
        with span("method", "sample"), pipe.progress_bar(total=self.steps - first) as bar:
            for i in each_step(range(first, self.steps)):
                if pipe.interrupt:
                    continue
                if text is None:
                    text = pipe.runner.text(prompt_embeds)
                if net is None:
                    predicted = pipe._predict(latents, times[i], text, self.split)[0]
                else:
                    predicted = self._under(net, latents, timesteps[i], prompt_embeds, hint)
                    predicted = widened(predicted)
                held = {} if mask is None else {"mask": mask, "background": levels.pop()}
                latents = guided_ddim_step(latents, predicted, rows[i], **held)
                if self.callback is not None:
                    latents, prompt_embeds = pipe._call_back(
                        self.callback, self.wanted, self.done, timesteps[i],
                        latents=latents, prompt_embeds=prompt_embeds,
                    )  # fmt: skip
                    text = None if "prompt_embeds" in self.wanted else text
                self.done += 1
                bar.update()
        return latents

    def inverted(self, clean: Tensor, count: int) -> list[Tensor]:
        """A latent and what DDIM inversion makes of it in `count` steps, one after the other."""
        pipe = self.pipe
        text = pipe.runner.text(pipe._encode_prompts([pipe.settings.inversion_prompt]))
        timesteps, rows = ddim_table(pipe.inverse_scheduler, self.steps, 1.0, clean.device)
        levels = [clean]
        pairs = list(zip(pipe.runner.times(timesteps), rows, strict=True))[:count]
        with span("method", "invert"):
            for time, row in each_step(pairs):
                noise = pipe._predict(levels[-1], time, text)[0]
                levels.append(guided_ddim_step(levels[-1], noise, row))
        return levels

    @staticmethod
    def _at(clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
        """Eq. 6: the latent at a noise level."""
        return (alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise).to(clean.dtype)

    def _under(self, net, latents, t, text, hint) -> Tensor:
        """The noise under a ControlNet, in the plain UNet.

        Args:
            hint: [1, C, h, w], the condition's features.
        """
        given = latents.to(text.dtype).repeat(len(text), 1, 1, 1)
        with hint_made(net):
            down, middle = net(
                given, t, encoder_hidden_states=text, controlnet_cond=hint, return_dict=False
            )
        return self.pipe.unet(
            given, t, encoder_hidden_states=text, down_block_additional_residuals=down,
            mid_block_additional_residual=middle, cross_attention_kwargs={"num_frames": 1},
            return_dict=False,
        )[0]  # fmt: skip


def _points(picture: Tensor) -> Tensor:
    """[3, H, W] -> [H * W, 3]."""
    return picture.flatten(1).T
