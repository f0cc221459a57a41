"""An edit's settings: validated, read from YAML, under our names or Tune-A-Video's."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tvkernels.pipelines.words import parse_pair

EMBEDDED = "embedded"
"""The name of the model that the package carries."""


class ConfigError(ValueError):
    """Settings that cannot be used; one line that says what to do."""


Count = Annotated[int, Field(ge=1)]
PAIR = re.compile(r"(\d+)\s*[x×]\s*(\d+)")  # width x height
UNITS = {f"{p}{kind}": n ** (1 + i) for kind, n in (("B", 1000), ("iB", 1024))
         for i, p in enumerate("KMGT")}  # fmt: skip


def parse_bytes(text: str) -> int:
    """Bytes of "8GB" (10^9 each), "512MiB" (2^20 each) and the like, in any case.

    Raises:
        ValueError: no number above zero with such a unit.
    """
    units = {name.lower(): size for name, size in UNITS.items()}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?b)", text.strip().lower())
    size = int(float(found[1]) * units[found[2]]) if found else 0
    if size < 1:
        raise ValueError(f"write a size such as 8GB or 512MiB, not {text!r}")
    return size


def _size_text(text: str) -> str:
    parse_bytes(text)
    return text


def parse_lora(text: str) -> tuple[Path, float]:
    """The file and the weight, 1 by default, of "FILE" or "FILE:weight".

    What stands behind the last colon is a weight only where it is a number and the file is there
    without it: names may have colons.

    Raises:
        ValueError: a weight that is 0, for nothing of the LoRA would be left, or is not finite.
    """
    name, colon, last = text.rpartition(":")
    if not colon or Path(text).exists() or not Path(name).exists():
        return Path(text), 1.0
    try:
        weight = float(last)
    except ValueError:
        return Path(text), 1.0
    if not weight or not math.isfinite(weight):
        raise ValueError(f"weight {last} of {name}: give another number, or leave the LoRA out")
    return Path(name), weight


def _lora_text(text: str) -> str:
    parse_lora(text)
    return text


def _size(value: Any) -> Any:
    """A side as text, or "768x432", the width first as everywhere, as (height, width)."""
    pair = PAIR.fullmatch(value) if isinstance(value, str) else None
    if isinstance(value, str) and not pair and not re.fullmatch(r"[+-]?\d+", value.strip()):
        raise ValueError(
            f"write pixels of the shorter side, such as 512, or both as 768x432, not {value!r}"
        )
    return (pair[2], pair[1]) if pair else value


def _pair_text(text: str) -> str:
    return "=".join(parse_pair(text))


def _several(value: Any) -> Any:
    return [value] if isinstance(value, (str, Path)) else value


def _full(text: str) -> str:
    if not text.strip():
        raise ValueError("an empty prompt asks for nothing: say what the edited clip should show")
    return text


class EditSettings(BaseModel):
    """What an edit is made from. None stands for what the method, the model or the clip say.

    Attributes:
        clip: the source: a video file or a folder of images.
        method: a name of `tvkernels.pipelines.METHODS`.
        model: a Stable Diffusion 1.x folder, .safetensors file or hub name, or "embedded".
        variant: of the folder's files, such as fp16.
        lora: files of LoRA weights, "FILE" or "FILE:weight" each.
        embedding: files of textual inversions.
        source_prompt: what the clip shows, for methods that read it.
        prompts: what the edited clips should show, one output each.
        negative_prompt: what the unconditional half of the guidance reads.
        clip_skip: layers left out at the end of the text encoder.
        words: "old=new" each: what changes between the prompts, for methods that mask it.
        mask: image, video or folder, bright where the clip may change, instead of words.
        foreground_prompt, background_prompt: StableVideo's, apart; without, the prompt is the
            foreground's and the background stays.
        controlnet_canny, controlnet_depth, depth_model: folders or hub names of its guides.
        atlas_dir: folder of an atlas that `tvk atlas` made of the same frames.
        start, stride, frames: the frames taken: from which, every how many, how many; without
            `frames` all that follow.
        size: pixels of the shorter side, or (height, width), as text "768x432", width first.
        crop: keep the proportions and cut what hangs over; False squeezes.
        tune_steps, learning_rate, weight_decay: of the one-shot tuning.
        steps: DDIM steps of the inversion and of the sampling.
        guidance: classifier-free guidance scale.
        seed: of everything drawn.
        dtype: auto, fp32, bf16 or fp16, see `tvkernels.devices.pick_dtype`.
        device: what it runs on, see `tvkernels.devices.pick_device`.
        backend: of the attention ops.
        runtime: what inversion and sampling run under, a name of `tvkernels.runtime.BACKENDS`.
        gradient_checkpointing: less memory while tuning, the same result.
        max_memory: "8GB": the edit is planned so that its tensors stay under it by accounting.
        cache: folder that keeps preprocessing, None for the user's own, False for none.
        output: the edited clip; with several prompts a number goes before its ending.
        output_dir: instead of `output`, a folder; clips are named after their prompts.
        audio: keep the sound of the frames taken, where the output can.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    clip: Path | None = None
    method: str = "ei2"
    model: str = EMBEDDED
    variant: str | None = None
    lora: Annotated[
        list[Annotated[str, AfterValidator(_lora_text)]] | None, BeforeValidator(_several)
    ] = None
    embedding: Annotated[list[Path] | None, BeforeValidator(_several)] = None
    source_prompt: str | None = None
    prompts: Annotated[list[Annotated[str, AfterValidator(_full)]], Field(min_length=1)] | None = (
        None
    )
    negative_prompt: str = ""
    clip_skip: Annotated[int, Field(ge=0)] | None = None
    words: Annotated[
        list[Annotated[str, AfterValidator(_pair_text)]] | None, BeforeValidator(_several)
    ] = None
    mask: Path | None = None
    foreground_prompt: str | None = None
    background_prompt: str | None = None
    controlnet_canny: str | None = None
    controlnet_depth: str | None = None
    depth_model: str | None = None
    atlas_dir: Path | None = None
    start: Annotated[int, Field(ge=0)] = 0
    stride: Count = 1
    frames: Count | None = None
    size: Annotated[Count | tuple[Count, Count] | None, BeforeValidator(_size)] = None
    crop: bool = True
    tune_steps: Annotated[int, Field(ge=0)] | None = None
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    steps: Annotated[int, Field(ge=1, le=999)] | None = None
    guidance: Annotated[float, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: str = "auto"
    backend: Literal["auto", "triton", "cuda", "native", "cpu", "reference"] = "auto"
    runtime: Literal["eager", "compile", "cuda_graph", "onnx", "tensorrt", "aoti"] = "eager"
    gradient_checkpointing: bool = False
    max_memory: Annotated[str, AfterValidator(_size_text)] | None = None
    cache: Path | Literal[False] | None = None
    output: Path | None = None
    output_dir: Path | None = None
    audio: bool = True


# Tune-A-Video's configuration files: its name -> ours. Two names of one thing must agree.
TUNE_A_VIDEO_NAMES = {
    "pretrained_model_path": "model",
    "output_dir": "output_dir",
    "train_data.video_path": "clip",
    "train_data.prompt": "source_prompt",
    "train_data.n_sample_frames": "frames",
    "train_data.sample_start_idx": "start",
    "train_data.sample_frame_rate": "stride",
    "train_data.width": "width",
    "train_data.height": "height",
    "validation_data.prompts": "prompts",
    "validation_data.negative_prompt": "negative_prompt",
    "validation_data.video_length": "frames",
    "validation_data.width": "width",
    "validation_data.height": "height",
    "validation_data.num_inference_steps": "steps",
    "validation_data.num_inv_steps": "steps",
    "validation_data.guidance_scale": "guidance",
    "max_train_steps": "tune_steps",
    "adam_weight_decay": "weight_decay",
}

# What its training script can do and these pipelines cannot: the one value that is honoured, why.
ONLY = {
    "trainable_modules": (
        ["attn1.to_q", "attn2.to_q", "attn_temp"],
        "what is tuned belongs to the method's recipe",
    ),
    "train_batch_size": (1, "one clip is tuned at a time"),
    "gradient_accumulation_steps": (1, "one clip is tuned at a time"),
    "scale_lr": (False, "the learning rate is used as given"),
    "lr_scheduler": ("constant", "the learning rate is constant"),
    "lr_warmup_steps": (0, "the learning rate is constant"),
    "adam_beta1": (0.9, "AdamW runs with its usual numbers"),
    "adam_beta2": (0.999, "AdamW runs with its usual numbers"),
    "adam_epsilon": (1e-8, "AdamW runs with its usual numbers"),
    "max_grad_norm": (1.0, "gradients are clipped at 1"),
    "use_8bit_adam": (False, "AdamW keeps its state in 32 bits"),
    "resume_from_checkpoint": (None, "an unfinished tuning starts again"),
    "validation_data.use_inv_latent": (True, "an edit starts from the inverted clip"),
    "validation_data.num_videos_per_prompt": (1, "a prompt gives one clip"),
    "validation_data.eta": (0.0, "DDIM draws no noise"),
}

# They change how the script runs, not what comes out, beyond rounding.
WITHOUT_EFFECT = {
    "mixed_precision": "`dtype` says what everything runs in",
    "enable_xformers_memory_efficient_attention": "the ops are chosen by `backend`",
    "checkpointing_steps": "tuned weights go to the cache",
    "validation_steps": "the clip is edited after the last step",
    "logging_dir": "nothing is logged to files",
}


RECORD = {"settings", "versions"}  # keys of what is kept beside an edited clip


def is_record(path: Path) -> bool:
    """Whether the file is one that an edit left beside its clip."""
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and document.keys() >= RECORD


def read_config(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Settings from a YAML file, or from the JSON record beside an edited clip.

    Args:
        path: keys are the names of `EditSettings` ("prompt" for a single one) or Tune-A-Video's.
    Returns:
        Settings under our names, not validated yet, and a note on each key without effect.
    Raises:
        ConfigError: no such file, not YAML, an unknown key, one that cannot be honoured, or two
            that contradict each other.
    """
    try:
        data = path.read_bytes()
        # What PowerShell's `>` writes begins with a mark of UTF-16.
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        document = yaml.safe_load(data.decode("utf-16" if wide else "utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no text in UTF-8: save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    recorded = isinstance(document, dict) and document.keys() >= RECORD
    document = document["settings"] if recorded else document
    if not isinstance(document, dict):
        raise ConfigError(f"{path} holds no settings: write lines like `method: ei2`")
    if recorded:
        document = dict(document)
        if not document.get("learning_rate"):  # of a method that tunes nothing
            document.pop("learning_rate", None)
    try:
        return _translate(document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def resolve(given: Mapping[str, Any]) -> EditSettings:
    """Validates settings under our names.

    Raises:
        ConfigError: every wrong value with its reason, in one line.
    """
    try:
        return EditSettings(**given)
    except ValidationError as error:
        raise ConfigError("; ".join(_problems(error))) from None


def _problems(error: ValidationError) -> list[str]:
    found: dict[str, list[str]] = {}
    value = ""
    for problem in error.errors(include_url=False):
        reasons = found.setdefault(str(problem["loc"][0]), [])
        if problem["type"] == "value_error":  # our own, which names the value itself
            reasons.append(str(problem["ctx"]["error"]))
            continue
        reasons.append(f"{problem['msg'][0].lower()}{problem['msg'][1:]}")
        value = f", not {problem['input']!r}"
    return [
        f"{name}: {' or '.join(dict.fromkeys(reasons))}" + (value if len(found) == 1 else "")
        for name, reasons in found.items()
    ]


def _translate(document: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    settings: dict[str, Any] = {}
    notes: list[str] = []
    came_from: dict[str, str] = {}
    unknown = []
    theirs = False
    for key, value in _flat(document).items():
        if key in EditSettings.model_fields or key == "prompt":
            name = "prompts" if key == "prompt" else key
        elif key in TUNE_A_VIDEO_NAMES:
            name = TUNE_A_VIDEO_NAMES[key]
        elif key in ONLY:
            _must_be(key, value)
            continue
        elif key in WITHOUT_EFFECT:
            notes.append(f"{key} has no effect: {WITHOUT_EFFECT[key]}")
            continue
        else:
            unknown.append(str(key))
            continue
        theirs = theirs or "." in key
        if name == "prompts" and isinstance(value, str):
            value = [value]
        if name in settings and settings[name] != value:
            raise ConfigError(
                f"{came_from[name]} is {settings[name]!r} and {key} is {value!r}: "
                "they must be the same"
            )
        settings[name], came_from[name] = value, key
    if unknown:
        raise ConfigError(f"unknown keys: {', '.join(unknown)}")
    _take_size(settings)
    if theirs:
        settings.setdefault("method", "tune-a-video")
    return settings, notes


def _flat(document: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if key not in ("train_data", "validation_data"):
            flat[key] = value
        elif isinstance(value, dict):
            flat.update({f"{key}.{name}": inner for name, inner in value.items()})
        else:
            raise ConfigError(f"{key} must hold keys of its own, such as video_path")
    return flat


def _must_be(key: str, value: Any) -> None:
    honoured, reason = ONLY[key]
    if key == "trainable_modules" and isinstance(value, (list, tuple)):
        value, honoured = sorted(value), sorted(honoured)
    if isinstance(honoured, float) and isinstance(value, str):
        with suppress(ValueError):
            value = float(value)  # YAML 1.1 reads 1e-8, without a point, as text
    if value != honoured:
        raise ConfigError(f"{key} cannot be {value!r} here: {reason}; leave it out")


def _take_size(settings: dict[str, Any]) -> None:
    """Tune-A-Video resizes to width x height without keeping the proportions."""
    width, height = settings.pop("width", None), settings.pop("height", None)
    if (width is None) != (height is None):
        raise ConfigError("width and height come together: give both or neither")
    if width is not None:
        if "size" in settings:
            raise ConfigError("give either size or width and height")
        settings["size"] = (height, width)
        settings.setdefault("crop", False)
