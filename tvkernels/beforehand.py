"""What `tvk edit` tells before the work, from clip, settings, model and runtime."""

from __future__ import annotations

import importlib
import shutil
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tvkernels.config import EMBEDDED, ConfigError, EditSettings, is_record, parse_lora
from tvkernels.demo import MODEL_DIR
from tvkernels.devices import DTYPES, SHORT, pick_device, pick_dtype
from tvkernels.fronts import check_taken, front
from tvkernels.pipelines import METHODS
from tvkernels.pipelines.checks import (
    check_embedding,
    check_lora,
    check_model,
    configuration,
    model_size,
    tokenizer_place,
)
from tvkernels.pipelines.files import read_shapes
from tvkernels.recipes import RECIPES
from tvkernels.video import OUTPUTS, Video, VideoError, check_output
from tvkernels.video.io import GIF_MAX_FPS

if TYPE_CHECKING:
    import torch

    from tvkernels.pipelines.one_shot import Settings

LONGEST = 100  # bytes of a clip's name that is made of its prompt, of the 255 that a name may have
RESERVED = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{n}{i}" for n in ("com", "lpt") for i in "0123456789¹²³"),
}
# Bytes of an output over those of its frames: a tenth of what a real clip took, 40 frames of
# 512 x 512 (1/74 as mp4, 1/4.4 as gif, 1/2.7 as PNG files), because a still one takes less.
SMALLEST = {".mp4": 1 / 740, ".gif": 1 / 44, "": 1 / 27}

# Pixels of a side that the encoders take, libx264 and FFmpeg's GIF.
LARGEST = {".mp4": 16384, ".gif": 65535}


def model_of(given: EditSettings) -> str:
    """The model's folder, file or hub name."""
    return str(MODEL_DIR) if given.model == EMBEDDED else given.model


def is_tuned(given: EditSettings) -> bool:
    """Whether the method tunes the model in this edit."""
    recipe = RECIPES.get(given.method)
    return bool(recipe and recipe.tuned) and given.tune_steps != 0


def check(given: EditSettings) -> list[Path]:
    """What can be wrong without reading clip or model; the outputs, one for each prompt.

    Raises:
        ConfigError, DeviceError, ModelError, VideoError: one line that says what to do.
    """
    if given.method not in METHODS:
        raise ConfigError(f"unknown method {given.method!r}: use one of {', '.join(METHODS)}")
    missing = [("clip", "CLIP")]
    if is_tuned(given) or front(given.method).reads_source:
        missing.append(("source_prompt", "--source-prompt"))
    for name, option in missing:
        if not getattr(given, name):
            raise ConfigError(f"{option} is missing: give it here or as {name} in --config")
    if not given.prompts:
        raise ConfigError("--prompt is missing: say what the edited clip should show")
    if not given.clip.exists():
        raise VideoError(f"{given.clip} does not exist")
    pick_device(given.device)
    check_model(model_of(given), given.variant)
    for text in given.lora or ():
        check_lora(parse_lora(text)[0])
    for file in given.embedding or ():
        check_embedding(file)
    check_taken(given)
    outputs = outputs_of(given)
    for output in outputs:
        _check_output(given, output)
    if isinstance(given.cache, Path):
        check_output(given.cache / "entry", ("",))
    return outputs


def _check_output(given: EditSettings, output: Path) -> None:
    kept = output.with_suffix(".json")
    check_output(output, OUTPUTS)
    check_output(kept, (".json",))
    if not output.suffix and output.exists() and (output.is_file() or any(output.iterdir())):
        raise VideoError(f"cannot write {output}: it is there already and not an empty folder")
    for source, what in ((given.clip, "the source clip"), (given.mask, "the mask")):
        if source is not None and output.resolve() == source.resolve():
            raise VideoError(f"cannot write {output}: it is {what}")
    if kept.exists() and not is_record(kept):
        raise VideoError(
            f"cannot write {kept}, the record of {output.name}: a file that is none is there, "
            "move it or name another output"
        )


def outputs_of(given: EditSettings) -> list[Path]:
    """Where each prompt's clip goes.

    Raises:
        ConfigError: nothing says where.
    """
    if given.output is not None:
        check_output(given.output, OUTPUTS)
        if len(given.prompts) == 1:
            return [given.output]
        stem, suffix = given.output.stem, given.output.suffix
        names = [f"{stem}-{i}{suffix}" for i in range(1, len(given.prompts) + 1)]
        return [given.output.with_name(name) for name in names]
    if given.output_dir is None:
        raise ConfigError("--output is missing: say where to write, such as -o edited.mp4")
    names: list[str] = []
    for prompt in given.prompts:
        name, number = slug(prompt), len(names) + 1
        while name in names:
            name, number = f"{slug(prompt)}-{number}", number + 1
        names.append(name)
    return [given.output_dir / f"{name}.mp4" for name in names]


def slug(prompt: str) -> str:
    """A file's name, in any script, that every system takes: "a blue star!" as "a-blue-star"."""
    text = unicodedata.normalize("NFC", prompt).lower()
    # Marks belong to their letters: without its vowel signs a word of Hindi is another.
    kept = "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text)
    name = "-".join(kept.split()).encode()[:LONGEST].decode(errors="ignore").strip("-")
    return f"{name}-edited" if name in RESERVED else name or "edited"


def nearest(sides: Sequence[int], multiple: int) -> tuple[int, ...]:
    """The multiples that are nearest to these pixels, one at least."""
    return tuple(max(1, (2 * side + multiple) // (2 * multiple)) * multiple for side in sides)


def fit_size(given: EditSettings) -> tuple[int | tuple[int, int], int, list[str]]:
    """The size to read the clip at, what both sides divide by, and lines for the user.

    Raises:
        ConfigError: a height and width that cannot be; the nearest that can are named.
    """
    largest, multiple = model_size(model_of(given))
    size = given.size or largest
    sides = (size,) if isinstance(size, int) else size
    near = nearest(sides, multiple)
    lines = []
    if near != tuple(sides):
        if not isinstance(size, int):
            raise ConfigError(
                f"size {sides[1]}x{sides[0]} cannot be: the model takes multiples of {multiple}, "
                f"the nearest is {near[1]}x{near[0]}"
            )
        lines.append(f"size {size} becomes {near[0]}: the model takes multiples of {multiple}")
    if min(near) > largest:
        from tvkernels.sizing import check_side

        check_side(min(near))
        lines.append(
            f"size {min(near)} is above the {largest} pixels that the model was trained on: "
            "it may repeat what it draws"
        )
    return (near[0] if isinstance(size, int) else near), multiple, lines


class Asked(NamedTuple):
    """Settings that are whole, and what their method makes of them."""

    settings: EditSettings
    tuned: bool
    draws: bool
    reads_source: bool


class Idle(NamedTuple):
    """An option that has no effect where `when` holds; `refused`, or said only."""

    name: str
    refused: bool
    when: Callable[[Asked], object]
    why: str


def _untuned(name: str) -> Callable[[Asked], object]:
    return lambda asked: getattr(asked.settings, name) and not asked.tuned


IDLE = (
    Idle("tune_steps", True, _untuned("tune_steps"), "{method} tunes nothing"),
    Idle("learning_rate", True, _untuned("learning_rate"), "nothing is tuned"),
    Idle("weight_decay", True, _untuned("weight_decay"), "nothing is tuned"),
    Idle(
        "gradient_checkpointing", False, _untuned("gradient_checkpointing"), "nothing is tuned"
    ),
    Idle(
        "negative_prompt", True,
        lambda asked: asked.settings.negative_prompt and asked.settings.guidance <= 1,
        "there is no unconditional half at a guidance of 1 or less",
    ),
    Idle(
        "seed", False, lambda asked: asked.settings.seed and not (asked.tuned or asked.draws),
        "{method} draws nothing",
    ),
    Idle(
        "source_prompt", False,
        lambda asked: asked.settings.source_prompt and not (asked.tuned or asked.reads_source),
        "nothing is tuned",
    ),
    Idle(
        "output_dir", False, lambda asked: asked.settings.output and asked.settings.output_dir,
        "--output says where to write",
    ),
)  # fmt: skip


def idle(settings: EditSettings) -> list[Idle]:
    """The options that have no effect."""
    own = front(settings.method)
    asked = Asked(settings, is_tuned(settings), own.draws, own.reads_source)
    return [each for each in IDLE if each.when(asked)]


def check_idle(
    given: EditSettings, settings: EditSettings, told: Collection[str] | None = None
) -> list[str]:
    """Lines on options without effect.

    Args:
        given: as the user gave them.
        settings: the same, filled up.
        told: names of those that are asked for now, None for all.
    Raises:
        ConfigError: one of these that asks for what will not be done.
    """
    lines = []
    for each in idle(settings):
        if getattr(given, each.name) is None:
            continue
        option, why = each.name.replace("_", "-"), each.why.format(method=settings.method)
        if each.refused and (told is None or each.name in told):
            raise ConfigError(f"--{option} has no effect, {why}: leave out --{option}")
        lines.append(f"{each.name} has no effect: {why}")
    return lines


def dtype_of(given: EditSettings, device: torch.device) -> torch.dtype:
    """What the edit runs in: as asked for, by itself what both device and runtime take."""
    dtype = pick_dtype(given.dtype, device, given.model == EMBEDDED, is_tuned(given))
    taken = _runtime(given).DTYPES
    return dtype if given.dtype != "auto" or dtype in taken else DTYPES["fp32"]


def _runtime(settings: EditSettings):
    return importlib.import_module(f"tvkernels.runtime.{settings.runtime}")


def check_runtime(settings: EditSettings, device: torch.device, dtype: torch.dtype) -> None:
    """Whether runtime, backend and dtype can run on the device, before any weights are loaded.

    Raises:
        ConfigError: they cannot, with every reason.
    """
    from tvkernels.info import backend_reasons
    from tvkernels.runtime import why_not

    if SHORT[dtype] == "fp16" and is_tuned(settings):
        raise ConfigError(
            f"fp16 cannot be tuned: use --dtype bf16 or fp32, or --tune-steps 0 with "
            f"{settings.method}"
        )
    if settings.backend != "auto":
        reasons = backend_reasons(settings.backend, device, dtype)
        if reasons:
            raise ConfigError(
                f"the backend {settings.backend} cannot run here: {'; '.join(reasons)}"
            )
    if settings.runtime == "eager":
        return
    if settings.max_memory is not None:
        raise ConfigError(
            f"--max-memory accounts for the eager runtime, not for {settings.runtime}: leave one "
            "of the two out"
        )
    reasons = why_not(settings.runtime, device.type, dtype)
    if reasons:
        raise ConfigError(f"the runtime {settings.runtime} cannot run here: {'; '.join(reasons)}")
    if _runtime(settings).LIVE:
        return
    # What is exported has one size at each of the UNet's halvings.
    _, multiple = model_size(model_of(settings))
    multiple *= 2 ** (len(configuration(model_of(settings), "unet")["block_out_channels"]) - 1)
    near = nearest(settings.size, multiple)
    if near != tuple(settings.size):
        height, width = settings.size
        raise ConfigError(
            f"the runtime {settings.runtime} takes sides that are multiples of {multiple}, not "
            f"{width}x{height}: ask for --size {near[1]}x{near[0]} or another such"
        )


@contextmanager
def runtime_refusals(settings: EditSettings) -> Iterator[None]:
    """What a runtime cannot be prepared for, such as a size, is the settings' fault.

    Raises:
        ConfigError: instead of the runtime's own error.
    """
    from tvkernels.runtime.files import ArtifactError

    try:
        yield
    except ArtifactError as error:
        raise ConfigError(f"the runtime {settings.runtime}: {error}") from error


def check_texts(settings: EditSettings, numbers: Settings) -> list[str]:
    """The prompts as the model's tokenizer reads them: what is cut is warned of; lines on others.

    Raises:
        ConfigError: words that are not read, or more layers to skip than there are.
    """
    from transformers import CLIPTokenizer

    from tvkernels.pipelines.loading import loading
    from tvkernels.pipelines.text import tell_cut

    model = model_of(settings)
    with loading(f"the tokenizer of {model}"):
        tokenizer = CLIPTokenizer.from_pretrained(tokenizer_place(model), subfolder="tokenizer")
    lines, text_encoder = [], configuration(model, "text_encoder")
    read = [settings.source_prompt or "", *settings.prompts, settings.negative_prompt]
    read += [settings.foreground_prompt or "", settings.background_prompt or ""]
    for file in settings.embedding or ():
        word = check_embedding(file)
        width, has = read_shapes(file, "embedding").popitem()[1][-1], text_encoder["hidden_size"]
        if width != has:
            raise ConfigError(
                f"--embedding {file}: it has {width} channels, the model's text {has}: give one "
                "that was made for the model"
            )
        if not tokenizer.add_tokens([word]):
            raise ConfigError(
                f"--embedding {file}: the tokenizer has its word {word} already: give it once, "
                "or rename it"
            )
        if not any(word in text for text in read):
            lines.append(f"the embedding {file} has no effect: no prompt says {word}")
    tell_cut(tokenizer, list(dict.fromkeys(text for text in read if text)))
    front(settings.method).check_tokens(settings, numbers, tokenizer)
    most = text_encoder["num_hidden_layers"]
    if settings.clip_skip is not None and settings.clip_skip > most:
        raise ConfigError(
            f"--clip-skip {settings.clip_skip} is more than the text encoder's {most} layers"
        )
    return lines


def check_schedule(settings: EditSettings) -> None:
    """Whether the model's noise schedule has that many steps.

    Raises:
        ConfigError: it has fewer.
        ModelError: DDIM cannot follow it.
    """
    import diffusers

    from tvkernels.pipelines.common import ddim_schedulers, ddim_table

    config = configuration(model_of(settings), "scheduler")
    kind = getattr(diffusers, config.get("_class_name", ""), diffusers.DDIMScheduler)
    for scheduler in ddim_schedulers(kind.from_config(config)):
        try:
            ddim_table(scheduler, settings.steps, settings.guidance, "cpu")
        except ValueError as error:
            raise ConfigError(f"--steps: {error}") from None


def check_written(outputs: list[Path], video: Video) -> None:
    """Whether the clip, as far as it is read, can be written as its outputs are.

    Raises:
        VideoError: it is too large, a GIF cannot play it, or the disk has no room for it.
    """
    longer = max(video.frames.shape[1:3])
    for output in outputs:
        most = LARGEST.get(output.suffix.lower(), longer)
        if longer > most:
            raise VideoError(
                f"cannot write {output}: its sides have {most} pixels at most, not {longer}: ask "
                "for a smaller --size"
            )
        if output.suffix.lower() == ".gif" and video.fps > GIF_MAX_FPS:
            raise VideoError(
                f"a GIF plays at most {GIF_MAX_FPS} frames a second, not {float(video.fps):g}: "
                "write an mp4 or take fewer frames with --stride"
            )
    folder = next(parent for parent in outputs[0].absolute().parents if parent.exists())
    least = len(outputs) * SMALLEST[outputs[0].suffix.lower()] * video.frames.nbytes
    free = shutil.disk_usage(folder).free
    if free < least:
        raise VideoError(
            f"cannot write {outputs[0]}: its disk has {free / 1e6:.1f} MB left, "
            f"{least / 1e6:.1f} at least are needed"
        )
