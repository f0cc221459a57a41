"""What `tvk edit` asks, checks and hands on for one method alone: a class and its line below."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tvkernels.config import ConfigError, EditSettings
from tvkernels.pipelines.guides import load_guides, prepared
from tvkernels.pipelines.words import WordError, changed_words, check_words, word_tokens
from tvkernels.video import Video, read_mask

if TYPE_CHECKING:
    import numpy as np

    from tvkernels.pipelines.one_shot import OneShotPipeline, Settings

Words = list[tuple[str, str]]


class Front:
    """A method without options of its own, and what the others may say.

    Attributes:
        takes: names of `EditSettings` that this method takes beside what all of them take.
        reads_source: whether the source prompt matters where nothing is tuned.
        draws: whether anything is drawn where nothing is tuned.
        stages: what goes before sampling, as `fit` and `invert` are called in lines and records;
            a method without an inversion has one.
    """

    takes: tuple[str, ...] = ()
    reads_source = False
    draws = False
    stages: tuple[str, ...] = ("tuning", "inversion")

    def check(self, given: EditSettings) -> list[str]:
        """What can be wrong before anything is read; lines for the user.

        Raises:
            ConfigError: one line that says what to do.
        """
        return []

    def check_tokens(self, settings: EditSettings, numbers: Settings, tokenizer) -> None:
        """What can be wrong with the prompts as the model reads them.

        Raises:
            ConfigError: one line that says what to do.
        """

    def load(self, settings: EditSettings) -> dict[str, Any]:
        """What the pipeline takes when it is loaded.

        Raises:
            ModelError: it cannot be loaded.
        """
        return {}

    def fit(self, settings: EditSettings, video: Video) -> dict[str, Any]:
        """What `fit` takes.

        Raises:
            VideoError: it does not fit the clip.
        """
        return {}

    def call(self, settings: EditSettings, video: Video, prompt: str) -> dict[str, Any]:
        """What the call with a prompt takes; raises as `check` and `fit` do."""
        return {}

    def record(self, call: dict[str, Any]) -> dict[str, Any]:
        """Settings that `call` decided, for the record beside the clip."""
        return {}

    def say(self, pipe: OneShotPipeline) -> list[str]:
        """Lines for the user, of the loaded pipeline."""
        return []


class BlendedDiffusion(Front):
    takes = ("words", "mask")
    reads_source = True

    def check(self, given: EditSettings) -> list[str]:
        if given.words and given.mask:
            raise ConfigError("give either --words or --mask: a mask is used instead of words")
        if given.max_memory is not None:
            raise ConfigError(
                f"--max-memory does not account for what {given.method} keeps of every step: "
                "leave it out"
            )
        if given.mask is not None:
            return []
        if given.runtime != "eager":
            from tvkernels.runtime.runner import MAPPING

            if given.runtime not in MAPPING:
                raise ConfigError(
                    f"the runtime {given.runtime} gives no maps of words, and "
                    f"{given.method} makes its mask of them: use {' or '.join(MAPPING)}, "
                    "or give --mask"
                )
        found = [self._words(given, prompt) for prompt in given.prompts]
        if given.words is not None:
            return []
        pairs = (", ".join(f"{old} -> {new}" for old, new in words) for words in found)
        return [f"words that change: {text}" for text in pairs]

    def check_tokens(self, settings: EditSettings, numbers: Settings, tokenizer) -> None:
        for prompt in settings.prompts if settings.mask is None else ():
            for old, new in self._words(settings, prompt):
                try:
                    word_tokens(tokenizer, settings.source_prompt, old, numbers.after)
                    word_tokens(tokenizer, prompt, new, numbers.after)
                except WordError as error:
                    raise ConfigError(f"--words: {error}") from None

    def call(self, settings: EditSettings, video: Video, prompt: str) -> dict[str, Any]:
        if settings.mask is None:
            return {"words": self._words(settings, prompt)}
        return {"mask": _mask(settings, video)}

    def record(self, call: dict[str, Any]) -> dict[str, Any]:
        return {"words": ["=".join(pair) for pair in call["words"]]} if "words" in call else {}

    @staticmethod
    def _words(given: EditSettings, prompt: str) -> Words:
        try:
            if given.words is None:
                return changed_words(given.source_prompt, prompt)
            return check_words(given.words, given.source_prompt, prompt)
        except WordError as error:
            raise ConfigError(f"--words: {error}") from None


class StableVideo(Front):
    takes = (
        "mask", "foreground_prompt", "background_prompt", "controlnet_canny", "controlnet_depth",
        "depth_model", "atlas_dir",
    )  # fmt: skip
    draws = True
    stages = ("atlas",)

    def check(self, given: EditSettings) -> list[str]:
        if given.max_memory is not None:
            raise ConfigError(
                "--max-memory does not account for stable-video's atlas: leave it out"
            )
        if given.runtime != "eager" and (given.controlnet_canny or given.controlnet_depth):
            raise ConfigError(f"the runtime {given.runtime} takes no ControlNet: leave one out")
        if (given.controlnet_depth is None) != (given.depth_model is None):
            raise ConfigError(
                "--controlnet-depth and --depth-model go together: give both or neither"
            )
        if given.atlas_dir is not None and given.mask is not None:
            raise ConfigError(
                "give either --atlas-dir or --mask: the atlas has its layers already"
            )
        for option, value, part in (
            ("--controlnet-canny", given.controlnet_canny, given.foreground_prompt != ""),
            ("--controlnet-depth", given.controlnet_depth, given.background_prompt),
        ):
            if value is not None and not part:
                raise ConfigError(f"{option} guides a part that stays as it is: leave it out")
        if given.foreground_prompt == "" and not given.background_prompt:
            raise ConfigError(
                "an empty --foreground-prompt leaves the objects as they are: say with "
                "--background-prompt what should change"
            )
        if given.foreground_prompt is not None:
            if len(given.prompts) > 1:
                raise ConfigError(
                    f"{len(given.prompts)} prompts would give the same clip: --foreground-prompt "
                    "is used instead of them, so give one"
                )
            return ["the prompt has no effect: --foreground-prompt is used instead"]
        return []

    def load(self, settings: EditSettings) -> dict[str, Any]:
        return load_guides(
            settings.controlnet_canny, settings.controlnet_depth, settings.depth_model
        )

    def fit(self, settings: EditSettings, video: Video) -> dict[str, Any]:
        mask = None if settings.mask is None else _mask(settings, video)
        return prepared(video.frames, mask, settings.atlas_dir)

    def call(self, settings: EditSettings, video: Video, prompt: str) -> dict[str, Any]:
        return {
            name: getattr(settings, name) for name in ("foreground_prompt", "background_prompt")
        }

    def say(self, pipe: OneShotPipeline) -> list[str]:
        return [pipe.what_guides()]


def _mask(settings: EditSettings, video: Video) -> np.ndarray:
    """The mask of the frames taken, bool [F, H, W]."""
    return read_mask(
        settings.mask, len(video), video.frames.shape[1:3], video.fit,
        settings.start, settings.stride,
    )  # fmt: skip


FRONTS: dict[str, Front] = {"blended-diffusion": BlendedDiffusion(), "stable-video": StableVideo()}


def front(method: str) -> Front:
    """The front of a method."""
    return FRONTS.get(method, Front())


def check_taken(given: EditSettings) -> None:
    """Whether the method takes every option that some method alone takes.

    Raises:
        ConfigError: it does not; the text names those that do.
    """
    for name in dict.fromkeys(name for each in FRONTS.values() for name in each.takes):
        if getattr(given, name) is not None and name not in front(given.method).takes:
            those = ", ".join(method for method, each in FRONTS.items() if name in each.takes)
            option = name.replace("_", "-")
            raise ConfigError(f"{given.method} takes no --{option}: leave it out, or use {those}")


def strangers(method: str) -> set[str]:
    """Names of settings that other methods alone take."""
    return {name for each in FRONTS.values() for name in each.takes} - {*front(method).takes}
