"""The phases of an edit as calls on latents, of our pipelines and of their references alike.

No phase encodes or decodes frames: the VAE is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tvkernels import BackendError
from tvkernels.benchmarks.reference import load_reference
from tvkernels.pipelines.one_shot import OneShotPipeline
from tvkernels.pipelines.stable_video import _Job
from tvkernels.pipelines.words import changed_words
from tvkernels.runtime import accelerate

OURS = "ours"
# Provider -> attention of its reference.
PLAIN = {"reference": "math", "reference-sdpa": "sdpa"}
PROVIDERS = (OURS, *PLAIN)
# Single steps, tuning last since it changes the weights; then what an edit is made of.
STEPS = ("inversion", "sampling", "tuning")
WHOLE = ("edit", "preprocessing")
PHASES = (*STEPS, *WHOLE)
SOURCE = "a red circle on a gray background"
PROMPT = "a blue star on a gray background"
SEED = 0


class Unable(Exception):
    """A provider that cannot take part; the text says why."""


@dataclass
class Clip:
    """What is edited, and how.

    Args:
        latents: [F, 4, h, w].
        noise: [F, 4, h, w], where sampling starts.
        method: its name.
        guidance: scale of sampling; 1 or less samples one clip.
        learning_rate: of the tuning.
        told: the inversion's prompt.
    """

    latents: Tensor
    noise: Tensor
    method: str
    guidance: float
    learning_rate: float
    told: str


def clip_of(pipe: OneShotPipeline, method: str, frames: int, size: tuple[int, int]) -> Clip:
    """A random clip for a loaded pipeline; StableVideo edits pictures, one at a time."""
    generator = torch.Generator().manual_seed(SEED)
    frames = 1 if method == "stable-video" else frames
    shape = (2, frames, 4, *(side // pipe.multiple for side in size))
    drawn = torch.randn(shape, generator=generator).to(pipe.device, pipe.unet.dtype)
    told = SOURCE if method == "blended-diffusion" else pipe.settings.inversion_prompt
    numbers = pipe.settings
    return Clip(*drawn, method, numbers.guidance, numbers.learning_rate, told)


class Ours:
    """A pipeline of `tvkernels.pipelines` behind the calls of `reference.loop.Reference`.

    Args:
        pipe: loaded; others may share it, one after the other.
        method: its name.
        runtime: of inversion and sampling.
    Raises:
        Unable: the runtime cannot run here.
    """

    def __init__(self, pipe: OneShotPipeline, method: str, runtime: str = "eager"):
        self.pipe, self.method, self.unet = pipe, method, pipe.unet
        self.settings = pipe.settings
        try:
            self.runner = accelerate(pipe.unet, runtime)
        except BackendError as error:
            raise Unable("; ".join(str(error).splitlines()[1:])) from None
        pipe._encode_video = lambda latents, chunk: latents

    def load(self, state) -> None:
        """The pipeline's weights have been put back."""
        self.runner.weights_changed()

    def tune(self, latents, prompt, steps, learning_rate, generator) -> None:
        self.pipe.runner = self.runner
        text = self.pipe._encode_prompts([prompt])
        self.pipe._tune(latents, text, steps, learning_rate, generator)
        self.runner.weights_changed()

    def invert(self, latents, prompt, steps) -> Tensor:
        self.pipe.runner = self.runner
        told = (prompt,) if self.method == "blended-diffusion" else ()
        return self.pipe.invert(latents, *told, num_inference_steps=steps)

    def sample(self, latents, prompt, steps, guidance, **words) -> Tensor:
        self.pipe.runner = self.runner
        return self.pipe(
            prompt, latents=latents, num_inference_steps=steps,
            guidance_scale=guidance, output_type="latent", **words,
        ).frames  # fmt: skip


class Pictures(Ours):
    """StableVideo, which inverts and samples each picture within its edit."""

    def _job(self, steps: int, guidance: float = 1.0) -> _Job:
        self.pipe.runner = self.runner
        return _Job(self.pipe, steps, guidance, None, None, None, (), False)

    @torch.no_grad()
    def levels(self, latents, steps, count) -> list[Tensor]:
        return self._job(steps).inverted(latents, count)

    @torch.no_grad()
    def denoise(self, levels, prompt, steps, guidance, mask) -> Tensor:
        job = self._job(steps, guidance)
        return job.denoise(levels, job.texts(prompt), mask=mask)

    def invert(self, latents, prompt, steps) -> Tensor:
        return self.levels(latents, steps, steps)[-1]


def provider(pipe: OneShotPipeline, method: str, name: str, runtime: str = "eager"):
    """What runs a method's phases.

    Args:
        pipe: loaded; a reference copies its models.
        method: its name.
        name: of `PROVIDERS`.
        runtime: of ours.
    Raises:
        Unable: the text says why.
    """
    if name == OURS:
        return (Pictures if method == "stable-video" else Ours)(pipe, method, runtime)
    if runtime != "eager":
        raise Unable("references run eagerly alone")
    try:
        return load_reference(pipe, attention=PLAIN[name])
    except ValueError as error:
        raise Unable(str(error)) from None


def phase_call(one, clip: Clip, phase: str, steps: int, tune_steps: int) -> Callable[[], Tensor]:
    """A phase of an edit, ready to be called again and again.

    Args:
        one: a `provider`.
        clip: what is edited.
        phase: a name of `PHASES`.
        steps: of DDIM.
        tune_steps: of the tuning.
    Returns:
        The call, which returns its latents; the tuning's, those that went in.
    """

    def tune() -> Tensor:
        generator = torch.Generator().manual_seed(SEED)
        one.tune(clip.latents, SOURCE, tune_steps, clip.learning_rate, generator)
        return clip.latents

    def invert() -> Tensor:
        return one.invert(clip.latents, clip.told, steps)

    def sample() -> Tensor:
        return one.sample(clip.noise, PROMPT, steps, clip.guidance, **words)

    def prepare() -> Tensor:
        if tune_steps:
            tune()
        return invert()

    if clip.method == "stable-video" and phase in ("sampling", "edit"):
        return _of_a_picture(one, clip, phase, steps)
    words = {}
    if clip.method == "blended-diffusion":
        words = {"words": changed_words(SOURCE, PROMPT)}
        if phase in ("sampling", "edit"):
            invert()  # what it blends with
    found = {"tuning": tune, "inversion": invert, "preprocessing": prepare}
    return found.get(phase, sample)


def _of_a_picture(one, clip: Clip, phase: str, steps: int) -> Callable[[], Tensor]:
    """As `tvk edit` edits a key frame: from its own inversion, held to it outside of the layer.

    The layer is half the picture each way. A whole edit inverts and samples the last steps, as
    many as the method's strength takes.
    """
    height, width = clip.latents.shape[2:]
    mask = torch.zeros(1, 1, height, width, dtype=torch.bool, device=clip.latents.device)
    mask[..., height // 4 : -(height // 4), width // 4 : -(width // 4)] = True
    count = steps
    if phase == "edit":
        count = max(1, min(steps, round(steps * one.settings.first)))
    kept = one.levels(clip.latents, steps, count)

    def sample() -> Tensor:
        return one.denoise(kept, PROMPT, steps, clip.guidance, mask)

    def edit() -> Tensor:
        levels = one.levels(clip.latents, steps, count)
        return one.denoise(levels, PROMPT, steps, clip.guidance, mask)

    return edit if phase == "edit" else sample


def weight_bytes(one) -> int:
    """Of the UNet, once."""
    unet: nn.Module = one.unet
    tensors = [*unet.parameters(), *unet.buffers()]
    return sum({x.untyped_storage().data_ptr(): x.nbytes for x in tensors}.values())
