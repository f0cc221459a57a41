"""What `tvk edit` does: check, resolve, tune, invert, sample, write, and keep a record."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvkernels.config import EMBEDDED, ConfigError, EditSettings, is_record, parse_bytes
from tvkernels.demo import MODEL_DIR
from tvkernels.demo.settings import OVERRIDES
from tvkernels.fronts import check_taken, front, strangers
from tvkernels.pipelines import METHODS
from tvkernels.pipelines.checks import ModelError, check_model, model_size
from tvkernels.pipelines.loading import load_pipeline, quiet_class
from tvkernels.video import (
    OUTPUTS,
    Video,
    VideoError,
    check_output,
    read_video,
    write_video,
)
from tvkernels.video._files import atomic_path
from tvkernels.video.io import GIF_MAX_FPS

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from tvkernels.pipelines.cache import Cache
    from tvkernels.pipelines.one_shot import OneShotPipeline, Settings
    from tvkernels.runtime.memory import Plan

PACKAGES = ("tvkernels", "torch", "diffusers", "transformers", "safetensors", "numpy", "av")
NUMBERS = ("tune_steps", "learning_rate", "steps", "guidance")


def edit(given: EditSettings, notes: list[str], say: Callable[[str], None]) -> list[Path]:
    """Edits a clip, once for each prompt.

    Args:
        given: settings; what is None is decided here.
        notes: keys of the configuration file without effect.
        say: shows one line to the user.
    Returns:
        The edited clips. Beside each lies a JSON file: the settings it was made with, which
        `tvk edit --config` reads again, versions, model, seconds and cache hits.
    Raises:
        ConfigError, ModelError, VideoError: before any work of weight has begun, except where the
            disk fills up.
    """
    began = time.perf_counter()
    outputs, own = check(given), front(given.method)
    asked = own.check(given)
    model = MODEL_DIR if given.model == EMBEDDED else given.model
    size, multiple = _size(given, *model_size(model))
    if given.frames is not None:
        video = _read(given, size, multiple, given.frames)
    else:
        # The first frame tells whether this is a clip at all, before the slow imports.
        _read(given, size, multiple, 1)
    numbers, said = method_numbers(given.method, given.model == EMBEDDED)
    if given.frames is None:
        video = _read_up_to(given, size, multiple, numbers.frames)
    if video.fps > GIF_MAX_FPS and any(output.suffix.lower() == ".gif" for output in outputs):
        raise VideoError(
            f"a GIF plays at most {GIF_MAX_FPS} frames a second, not {float(video.fps):g}: "
            "write an mp4 or take fewer frames with --stride"
        )
    if given.tune_steps and not numbers.recipe.tuned:
        raise ConfigError(f"{given.method} tunes nothing: leave out --tune-steps")
    chosen = {n: getattr(numbers, n) for n in NUMBERS if getattr(given, n) is None}
    settings = given.model_copy(
        update={**chosen, "frames": len(video), "size": video.frames.shape[1:3]}
    )
    height, width = settings.size
    fitting = own.fit(settings, video)
    calls = [own.call(settings, video, prompt) for prompt in settings.prompts]
    say(
        f"{settings.method}, {settings.model} model: {settings.frames} frames of "
        f"{width} x {height}, tuning {settings.tune_steps} steps at "
        f"{settings.learning_rate:g}, DDIM {settings.steps} steps, "
        f"guidance {settings.guidance:g}, seed {settings.seed}"
    )
    said = [text for name, text in said.items() if name in chosen or name not in NUMBERS]
    if said:
        say(f"for the embedded model, in place of the method's own: {', '.join(said)}")
    for line in (*notes, *asked):
        say(line)
    check_runtime(settings)
    plan = None
    if settings.max_memory is not None:
        plan = plan_memory(settings, str(model), numbers.recipe)
        say(str(plan))
    clock = Clock()
    with clock("load"):
        offload = plan is not None and plan.offload
        pipe = load_pipeline(
            settings.method, str(model), settings.backend, offload=offload, settings=numbers,
            **own.load(settings),
        )  # fmt: skip
        if plan is not None and plan.tile is not None:
            from tvkernels.runtime.memory import tile_vae

            tile_vae(pipe.vae, plan.tile)
        from tvkernels.runtime.files import artifacts

        # Inductor's own place is the temporary folder, which a restart empties.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(artifacts() / "inductor"))
        pipe.accelerate(settings.runtime)
    cache = _cache(settings)
    for line in own.say(pipe):
        say(line)
    with runtime_refusals(settings):
        hits = preprocess(pipe, video, settings, cache, clock, say, plan, **fitting)
    others = {"output_dir", *strangers(settings.method)}
    record = {
        "settings": settings.model_dump(mode="json", exclude=others),
        "versions": versions(),
        "model": {"name": settings.model, "unet": type(pipe.unet).__name__},
        "device": device_name(pipe._execution_device),
        "cache": hits,
        "memory": None if plan is None else {**asdict(plan), "peak": plan.peak},
        "notes": [*said, *notes],
    }
    for prompt, output, call in zip(settings.prompts, outputs, calls, strict=True):
        with clock("sampling"), runtime_refusals(settings):
            pipe.set_progress_bar_config(desc="sampling", leave=False, disable=None)
            latents = sample(pipe, prompt, settings, plan, **call)
        with clock("decoding"):
            write_video(output, decode(pipe, latents, plan), video.fps)
        record["settings"].update(prompts=[prompt], output=str(output), **own.record(call))
        record["seconds"] = {**clock.seconds, "total": round(time.perf_counter() - began, 2)}
        record["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        kept = output.with_suffix(".json")
        write_json(kept, record)
        say(f"wrote {output} and {kept.name} (sampled in {clock.seconds['sampling']:.1f} s)")
    return outputs


def check(given: EditSettings) -> list[Path]:
    """What can be wrong without looking into clip or model; the outputs, one for each prompt.

    Raises:
        ConfigError, ModelError, VideoError: one line that says what to do.
    """
    if given.method not in METHODS:
        raise ConfigError(f"unknown method {given.method!r}: use one of {', '.join(METHODS)}")
    for name, option in (("clip", "CLIP"), ("source_prompt", "--source-prompt")):
        if not getattr(given, name):
            raise ConfigError(f"{option} is missing: give it here or as {name} in --config")
    if not given.prompts:
        raise ConfigError("--prompt is missing: say what the edited clip shall show")
    if not given.clip.exists():
        raise VideoError(f"{given.clip} does not exist")
    if given.model != EMBEDDED:
        check_model(given.model)
    check_taken(given)
    outputs = _outputs(given)
    for output in outputs:
        check_output(output, OUTPUTS)
        check_output(output.with_suffix(".json"), (".json",))
        if not output.suffix and output.exists() and (output.is_file() or any(output.iterdir())):
            raise VideoError(f"cannot write {output}: it is there already and not an empty folder")
        for given_file, what in ((given.clip, "the source clip"), (given.mask, "the mask")):
            if given_file is not None and output.resolve() == given_file.resolve():
                raise VideoError(f"cannot write {output}: it is {what}")
        kept = output.with_suffix(".json")
        if kept.exists() and not is_record(kept):
            raise VideoError(
                f"cannot write {kept}, the record of {output.name}: a file that is none is there, "
                "move it or name another output"
            )
    if isinstance(given.cache, Path):
        check_output(given.cache / "entry", ("",))
    return outputs


def _outputs(given: EditSettings) -> list[Path]:
    if given.output is not None:
        if len(given.prompts) == 1:
            return [given.output]
        stem, suffix = given.output.stem, given.output.suffix
        names = [f"{stem}-{i}{suffix}" for i in range(1, len(given.prompts) + 1)]
        return [given.output.with_name(name) for name in names]
    if given.output_dir is None:
        raise ConfigError("--output is missing: say where to write, such as -o edited.mp4")
    names: list[str] = []
    for prompt in given.prompts:
        slug = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60] or "edited"
        names.append(f"{slug}-{len(names) + 1}" if slug in names else slug)
    return [given.output_dir / f"{name}.mp4" for name in names]


def _size(given: EditSettings, largest: int, multiple: int) -> tuple[int | tuple, int]:
    size = given.size or largest
    shorter = size if isinstance(size, int) else min(size)
    if shorter > largest:
        raise ConfigError(
            f"size {shorter} is more than the {largest} pixels that the model was trained on: "
            f"ask for {largest} or less"
        )
    return size, multiple


def _read(given: EditSettings, size, multiple: int, frames: int | None) -> Video:
    return read_video(
        given.clip, start=given.start, stride=given.stride, frames=frames,
        size=size, multiple=multiple, crop=given.crop,
    )  # fmt: skip


def _read_up_to(given: EditSettings, size, multiple: int, frames: int) -> Video:
    try:
        return _read(given, size, multiple, frames)
    except VideoError:
        # Shorter than the method's number of frames: then all there are.
        return _read(given, size, multiple, None)


def method_numbers(method: str, embedded: bool) -> tuple[Settings, dict[str, str]]:
    """A method's settings, those of the demo in place for the embedded model, and what differs.

    Returns:
        Settings, and for each replaced number a text, such as "tune_steps 40 (500)".
    """
    own = quiet_class(method).settings
    overrides = OVERRIDES.get(method, {}) if embedded else {}
    changed = {n: v for n, v in overrides.items() if getattr(own, n) != v}
    said = {n: f"{n} {_plain(value)} ({_plain(getattr(own, n))})" for n, value in changed.items()}
    return replace(own, **changed), said


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def preferred_device() -> str:
    """The kind of device that models run on: cuda where torch sees one, else cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_runtime(settings: EditSettings) -> None:
    """Whether the runtime can run here, before any weights are loaded.

    Raises:
        ConfigError: it cannot, with every reason, or its memory cannot be accounted for.
    """
    from tvkernels.runtime import why_not

    if settings.runtime == "eager":
        return
    if settings.max_memory is not None:
        raise ConfigError(
            f"--max-memory accounts for the eager runtime, not for {settings.runtime}: leave one "
            "of the two out"
        )
    reasons = why_not(settings.runtime, preferred_device())
    if reasons:
        raise ConfigError(f"the runtime {settings.runtime} cannot run here: {'; '.join(reasons)}")


@contextmanager
def runtime_refusals(settings: EditSettings) -> Iterator[None]:
    """What a runtime cannot be prepared for, such as a size, is the settings' fault.

    Raises:
        ConfigError: in place of the runtime's own error.
    """
    from tvkernels.runtime.files import ArtifactError

    try:
        yield
    except ArtifactError as error:
        raise ConfigError(f"the runtime {settings.runtime}: {error}") from error


def plan_memory(settings: EditSettings, model: str, recipe) -> Plan:
    """How the edit keeps under `max_memory`, from the model's configuration files alone.

    Raises:
        ConfigError: it cannot; the text names the least that would do.
        ModelError: the model has no such files.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig

    from tvkernels.runtime.memory import Account, BudgetError, plan

    try:
        account = Account(
            UNet2DConditionModel.load_config(model, subfolder="unet"),
            AutoencoderKL.load_config(model, subfolder="vae"),
            CLIPTextConfig.from_pretrained(model, subfolder="text_encoder").to_dict(),
            recipe, frames=settings.frames, size=settings.size,
        )  # fmt: skip
    except OSError as error:
        raise ModelError(f"cannot read {model}: {' '.join(str(error).split())}") from error
    try:
        return plan(
            parse_bytes(settings.max_memory), account, tune=bool(settings.tune_steps),
            guided=settings.guidance > 1, checkpointing=settings.gradient_checkpointing,
            device=preferred_device(),
        )  # fmt: skip
    except BudgetError as error:
        raise ConfigError(f"max_memory: {error}") from None


def preprocess(
    pipe: OneShotPipeline, video: Video, settings: EditSettings, cache: Cache | None,
    clock: Clock, say: Callable[[str], None], plan: Plan | None = None, **fitting,
) -> dict[str, str]:  # fmt: skip
    """Tunes and inverts; says what came from the cache, "hit", "miss" or "off" for each.

    `fitting` is what the method's `fit` takes alone.
    """
    import torch

    hits = {}
    checkpointing = settings.gradient_checkpointing or (plan and plan.gradient_checkpointing)
    chunk = {} if plan is None else {"decode_chunk_size": plan.chunk}
    for stage in ("tuning", "inversion"):
        pipe.set_progress_bar_config(desc=stage, leave=False, disable=None)
        before = cache.hits if cache else 0
        with clock(stage):
            if stage == "tuning":
                pipe.fit(
                    video.frames, settings.source_prompt, num_steps=settings.tune_steps,
                    learning_rate=settings.learning_rate,
                    generator=torch.Generator().manual_seed(settings.seed),
                    gradient_checkpointing=bool(checkpointing), cache=cache, **chunk, **fitting,
                )  # fmt: skip
            else:
                pipe.invert(video.frames, num_inference_steps=settings.steps, cache=cache, **chunk)
        hits[stage] = "off" if cache is None else "hit" if cache.hits > before else "miss"
        if stage == "tuning" and not settings.tune_steps and not pipe.in_pixels:
            hits[stage] = "off"
            continue
        source = "taken from the cache" if hits[stage] == "hit" else "done"
        say(f"{stage} {source} in {clock.seconds[stage]:.1f} s")
    return hits


def sample(
    pipe: OneShotPipeline, prompt: str, settings: EditSettings, plan: Plan | None = None, **extra
) -> Tensor:
    """The edited clip's latents [F, 4, h, w], or its pixels [1, F, 3, H, W] where the method
    composes them; `extra` is what the method's call takes alone.
    """
    # Where a program is compiled for a number of clips, inversion's of one serves both halves too.
    split = settings.runtime in ("compile", "aoti") or (plan is not None and plan.split_guidance)
    return pipe(
        prompt, num_inference_steps=settings.steps, guidance_scale=settings.guidance,
        negative_prompt=settings.negative_prompt, split_guidance=split,
        output_type="pt" if pipe.in_pixels else "latent",
        **extra,
    ).frames  # fmt: skip


def decode(
    pipe: OneShotPipeline, latents: Tensor, plan: Plan | None = None
) -> Iterator[np.ndarray]:
    """The clip's frames, uint8 [H, W, 3] each, decoded as they are asked for.

    A device works on the next chunk while one is copied and written.
    """
    from tvkernels.pipelines.common import decode_chunks

    if pipe.in_pixels:
        yield from fetch_bytes(latents[0])()
        return
    chunk = {} if plan is None else {"chunk": plan.chunk}
    waiting = None
    for pixels in decode_chunks(pipe.vae, latents, **chunk):
        ready, waiting = waiting, fetch_bytes(pixels)
        if ready is not None:
            yield from ready()
    if waiting is not None:
        yield from waiting()
    pipe.maybe_free_model_hooks()


def fetch_bytes(pixels: Tensor) -> Callable[[], np.ndarray]:
    """Starts to copy pixels [F, 3, H, W] in [0, 1] to the host.

    Returns:
        What waits for them: a function that gives uint8 [F, H, W, 3].
    """
    import torch

    found = pixels.mul(255).round().byte().permute(0, 2, 3, 1)
    if not found.is_cuda:
        return found.numpy
    host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
    host.copy_(found, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> np.ndarray:
        done.synchronize()
        return host.numpy()

    return wait


def _cache(settings: EditSettings) -> Cache | None:
    from tvkernels.pipelines.cache import Cache

    return None if settings.cache is False else Cache(settings.cache)


class Clock:
    """Wall-clock seconds by stage: `with clock("tuning"): ...`; a stage's last run counts."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - began, 2)


def versions() -> dict[str, str]:
    """Versions of Python and of every package whose code makes the result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name(device) -> str:
    """For instance "cuda: NVIDIA H200" or "cpu: x86_64, 2 cores"."""
    import torch

    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"cpu: {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file in one step.

    Raises:
        VideoError: it cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
