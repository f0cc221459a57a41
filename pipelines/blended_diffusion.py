"""Blended latent diffusion under attention control: the changed words' region alone is edited.

Memory. The inversion keeps the latents of every step and, for each token of the prompt, one map a
step at half the latents' size: at 64 x 64 latents, 8 frames, 50 steps and a prompt of 10 tokens in
float32 that is 27 MB and 20 MB. Every probability map of the same layers, kept for one pass as
Prompt-to-Prompt keeps them, would be 6.3 GB (5 layers at 32 x 32 and 5 at 16 x 16, 8 heads, 77
tokens); `tests/pipelines/test_blended.py` computes both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tvkernels import guided_ddim_step
from tvkernels._ranges import each_step, span
from tvkernels.pipelines.cache import Cache
from tvkernels.pipelines.common import ddim_table, working
from tvkernels.pipelines.masks import FLOORS, GivenMask, WordMask, latent_mask
from tvkernels.pipelines.one_shot import OneShotPipeline, Settings
from tvkernels.pipelines.words import (
    WordPairs,
    changed_words,
    check_words,
    prompt_ids,
    word_tokens,
)
from tvkernels.processors.maps import LEVELS
from tvkernels.recipes import BLENDED_DIFFUSION
from tvkernels.runtime.runner import MAPPING

MASKS, BACKGROUNDS = ("words", "none"), ("inverted", "random")


@dataclass(frozen=True)
class BlendedSettings(Settings):
    """A method's numbers, and the paper's ablations.

    Args:
        threshold: tau of eq. 5.
        levels: the cross-attention that is looked at, at 1 / 2**level of the latents' size.
        floor: what a map is measured from, up to its maximum in the frame: "zero", or its "mean"
            there, for a model that looks everywhere a little.
        after: tokens behind a word that count as its own; a causal text encoder may gather there
            what the word's phrase means.
        mask: "words" makes it from attention where none is given; "none" edits everything.
        background: "inverted" latents, or the clip under fresh "random" noise in each step.
    """

    threshold: float = 0.3
    levels: tuple[int, ...] = LEVELS
    floor: str = "zero"
    after: int = 0
    mask: str = "words"
    background: str = "inverted"

    def __post_init__(self):
        known = {"floor": FLOORS, "mask": MASKS, "background": BACKGROUNDS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                value = getattr(self, name)
                raise ValueError(f"unknown {name} {value!r}: use one of {', '.join(values)}")


# Section IV: DDIM 50 both ways, tau 0.3, 8 frames, nothing tuned; the guidance is not given, and
# Stable Diffusion's own is taken. The inversion is told the source prompt.
SETTINGS = BlendedSettings(
    recipe=BLENDED_DIFFUSION,
    frames=8,
    tune_steps=0,
    learning_rate=0.0,
    weight_decay=0.0,
    steps=50,
    guidance=7.5,
)


@dataclass(frozen=True)
class Inversion:
    """What the inversion of a clip leaves.

    Args:
        prompt: what it was told; None where it was told by text states.
        latents: [S + 1, F, 4, h, w], from the clip to noise.
        maps: [S, T, F, h', w'], where each token of the prompt is looked at in each step; None
            where the runtime gives no maps.
    """

    prompt: str | None
    latents: Tensor
    maps: Tensor | None


class BlendedDiffusionPipeline(OneShotPipeline):
    """`invert` a clip, then call with the new prompt and the words that change, or with a mask.

    Nothing is tuned: `fit` only notes what the clip shows. Further prompts and other words on the
    same clip need no second inversion.

    Attributes:
        source: the `Inversion`, None before.
        mask: bool [F, h, w], the last mask that was blended with; None before.
    """

    settings = SETTINGS
    source: Inversion | None = None
    mask: Tensor | None = None
    _source_prompt: str | None = None
    _edit: WordMask | GivenMask | None = None  # of the call under way
    _generator: torch.Generator | None = None

    def fit(self, video, prompt: str, **options) -> BlendedDiffusionPipeline:
        """Notes what the clip shows, for `invert`; arguments as `OneShotPipeline.fit`."""
        self.source, self._source_prompt = None, prompt
        return super().fit(video, prompt, **options)

    @working()
    def invert(
        self,
        video,
        source_prompt: str | None = None,
        *,
        num_inference_steps: int | None = None,
        decode_chunk_size: int = 8,
        cache: Cache | None = None,
        prompt_embeds: Tensor | None = None,
        clip_skip: int | None = None,
        cross_attention_kwargs: dict | None = None,
    ) -> Tensor:
        """DDIM inversion (eq. 4) that keeps each step's latents and each token's map.

        Args:
            video: uint8 [F, H, W, 3], PIL images, or float [F, 3, H, W] in [0, 1].
            source_prompt: what the clip shows; by default what `fit` was told.
            prompt_embeds: [1, L, C], instead of a source prompt; then edits need a mask.
            num_inference_steps, decode_chunk_size, cache, clip_skip, cross_attention_kwargs: as
                `OneShotPipeline.invert`.
        Returns:
            The noise [F, 4, h, w], also kept as `inverted`; all of it as `source`.
        Raises:
            ValueError: no source prompt, or frames that do not fit the model.
        """
        prompt = source_prompt
        if prompt is None and prompt_embeds is None:
            prompt = self._source_prompt
        if prompt is None and prompt_embeds is None:
            raise ValueError("say what the clip shows: pass source_prompt= or call fit() first")
        steps = self.settings.steps if num_inference_steps is None else num_inference_steps
        latents = self._encode_video(video, decode_chunk_size)
        looks = self.settings.mask == "words" and self.runner.backend in MAPPING
        looks = looks and prompt is not None
        timesteps, rows = ddim_table(self.inverse_scheduler, steps, 1.0, latents.device)
        with self._adapters_at(cross_attention_kwargs):
            states = self._texts(prompt, None, prompt_embeds, None, clip_skip, False)
            key = None
            if cache is not None:
                key = self._key(
                    latents=latents, times=timesteps, rows=rows, prompt=prompt, text=states,
                    maps=looks,
                )  # fmt: skip
                kept = cache.load(key)
                if kept is not None:
                    return self._keep(prompt, kept["latents"].to(latents), kept.get("maps"))
            words = range(len(self._read(prompt))) if looks else None
            text, path, maps = self.runner.text(states), [latents], []
            pairs = zip(self.runner.times(timesteps), rows, strict=True)
            with span("method", "invert"), self.progress_bar(total=steps) as bar:
                for time, row in each_step(pairs):
                    noise, seen = self._predict(path[-1], time, text, **self._look(words))
                    path.append(guided_ddim_step(path[-1], noise, row))
                    maps.append(seen)
                    bar.update()
        found = {"latents": torch.stack(path)} | ({"maps": torch.stack(maps)} if looks else {})
        if key is not None:
            cache.save(key, found)
        return self._keep(prompt, found["latents"], found.get("maps"))

    def _read(self, prompt: str) -> list[int]:
        return prompt_ids(self.tokenizer, self.maybe_convert_prompt(prompt, self.tokenizer))[0]

    def _keep(self, prompt: str | None, latents: Tensor, maps: Tensor | None) -> Tensor:
        maps = None if maps is None else maps.to(latents.device)
        self.source, self.inverted = Inversion(prompt, latents, maps), latents[-1]
        return self.inverted

    @working()
    def __call__(
        self,
        prompt: str | None = None,
        *,
        words: WordPairs | None = None,
        mask=None,
        video=None,
        source_prompt: str | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        callback_on_step_end=None,
        output_type: str = "pil",
        **options,
    ):
        """Samples the edited clip, blended with the source outside the mask at every step.

        Args:
            prompt: what the edited clip shall show.
            words: pairs of (word or phrase of the source prompt, that of `prompt`) whose regions
                are edited; by default those by which the prompts differ.
            mask: bool or number [F, H, W] or [H, W], array or tensor, above zero where the clip
                may change, in place of the words'. A latent with any pixel marked is edited.
            video, source_prompt: a clip to invert first.
            generator: draws the random background of that ablation.
            num_inference_steps, callback_on_step_end, output_type: as for `OneShotPipeline`, and
                so are its other arguments.
        Raises:
            WordError: a word is not in its prompt, or the differing words cannot be told.
            ValueError: no inversion to blend with, one of another number of steps, words and a
                mask, one of another size, or words under a runtime that gives no maps.
        """
        steps = self.settings.steps if num_inference_steps is None else num_inference_steps
        if video is not None:
            taken = ("decode_chunk_size", "clip_skip", "cross_attention_kwargs")
            shared = {name: options[name] for name in taken if name in options}
            self.invert(video, source_prompt, num_inference_steps=steps, **shared)
        elif source_prompt is not None:
            raise ValueError("source_prompt tells what a video shows: pass video= too")
        self._edit, self._generator = self._region(prompt, words, mask, steps), generator
        try:
            return super().__call__(
                prompt, num_inference_steps=steps, generator=generator, output_type=output_type,
                callback_on_step_end=callback_on_step_end, **options,
            )  # fmt: skip
        finally:
            self._edit = self._generator = None

    def check_words(
        self, source_prompt: str, prompt: str, words: WordPairs | None = None
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Where the words that change lie among the tokens that are read; no clip is needed.

        Args:
            source_prompt, prompt, words: as for a call.
        Returns:
            For each pair the positions in the source prompt, and those in the prompt.
        Raises:
            WordError: a word is not in its prompt or beyond what is read, or the differing words
                cannot be told.
        """
        if words is None:
            pairs = changed_words(source_prompt, prompt)
        else:
            pairs = check_words(words, source_prompt, prompt)

        def convert(text):  # a word of several vectors stands for several tokens
            return self.maybe_convert_prompt(text, self.tokenizer)

        old, new = (
            [
                word_tokens(
                    self.tokenizer, convert(text), convert(pair[side]), self.settings.after
                )
                for pair in pairs
            ]
            for side, text in enumerate((source_prompt, prompt))
        )
        return old, new

    def _region(self, prompt: str | None, words, mask, steps: int) -> WordMask | GivenMask:
        source, settings = self.source, self.settings
        if source is None:
            raise ValueError("nothing to blend with: pass video=, or invert() first")
        if len(source.latents) != steps + 1:
            inverted = len(source.latents) - 1
            raise ValueError(f"inverted in {inverted} steps: sample in as many, not {steps}")
        _, frames, _, *size = source.latents.shape
        if mask is not None and words is not None:
            raise ValueError("give either words or a mask: a mask takes the words' place")
        if mask is None and settings.mask == "none":
            mask = torch.ones(frames, *(side * self.multiple for side in size))
        if mask is not None:
            found = latent_mask(mask, frames, size, self.multiple)
            return GivenMask(found.to(source.latents.device))
        if prompt is None or source.prompt is None:
            raise ValueError("prompt_embeds name no words to find a region by: give a mask")
        if source.maps is None:
            raise ValueError(
                f"the runtime {self.runner.backend} gives no maps of words: give a mask"
            )
        old, new = self.check_words(source.prompt, prompt, words)
        return WordMask(size, old, new, settings.threshold, settings.floor)

    def _check_latents(self, latents: Tensor | None) -> None:
        shape = self.source.latents.shape[1:]
        if latents is not None and latents.shape != shape:
            raise ValueError(
                f"latents of {tuple(latents.shape)} for a clip inverted as {tuple(shape)}: leave "
                "them out, or give as many"
            )

    def _look(self, tokens) -> dict:
        """What asks the runner for maps of tokens, nothing for None."""
        if tokens is None:
            return {}
        tokens = torch.tensor([*tokens], device=self._execution_device)
        return {"tokens": tokens, "levels": self.settings.levels}

    def _update(self, i, latents, time, text, row, split):
        """Equation 2, blended by eq. 3 with the source at the noise level that it leads to."""
        source, edit = self.source, self._edit
        level = len(source.latents) - 2 - i
        noise, seen = self._predict(latents, time, text, split, **self._look(edit.tokens))
        mask = edit(None if source.maps is None else source.maps[level], seen)
        self.mask = mask[:, 0]
        background = source.latents[level]
        if self.settings.background == "random":
            drawn = randn_tensor(latents.shape, self._generator, latents.device, latents.dtype)
            share = row[1].to(latents.dtype)
            background = share.sqrt() * source.latents[0] + (1 - share).sqrt() * drawn
        return guided_ddim_step(latents, noise, row, mask=mask, background=background.to(latents))
