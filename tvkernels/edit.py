"""What `tvk edit` does: check, resolve, tune, invert, sample, write, and keep a record."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tvkernels import beforehand
from tvkernels.beforehand import is_tuned, model_of
from tvkernels.config import EMBEDDED, EditSettings, parse_lora
from tvkernels.demo.settings import method_numbers
from tvkernels.devices import SHORT, memory_advice, pick_device
from tvkernels.fronts import Front, front, strangers
from tvkernels.pipelines.loading import load_pipeline
from tvkernels.record import device_name, versions, write_json
from tvkernels.video import Video, read_video, write_video

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from tvkernels.pipelines.cache import Cache
    from tvkernels.pipelines.one_shot import OneShotPipeline, Settings
    from tvkernels.runtime.memory import Plan
    from tvkernels.video._audio import Audio

NUMBERS = ("tune_steps", "learning_rate", "steps", "guidance")
Say = Callable[[str], None]


@memory_advice()
def edit(
    given: EditSettings, notes: list[str], say: Say, told: Collection[str] | None = None
) -> list[Path]:
    """Edits a clip, once for each prompt.

    Args:
        given: settings; what is None is decided here.
        notes: keys of the configuration file without effect.
        say: shows one line to the user.
        told: names of the settings that are asked for now, None for all; one that has no effect
            is refused then, and said where a configuration file brings it.
    Returns:
        The edited clips. Beside each lies a JSON file: the settings it was made with, which
        `tvk edit --config` reads again, versions, model, seconds and cache hits.
    Raises:
        ConfigError, DeviceError, ModelError, VideoError: before any work of weight has begun,
            except where the disk fills up.
        torch.OutOfMemoryError: with what to lower.
    """
    began = time.perf_counter()
    outputs, own = beforehand.check(given), front(given.method)
    notes = [*notes, *own.check(given)]
    size, multiple, lines = beforehand.fit_size(given)
    notes += lines
    # The first frame tells whether this is a clip at all, before the slow imports.
    first = _read(given, size, multiple, 1)
    beforehand.check_written(outputs, first)
    numbers, said = method_numbers(given.method, given.model == EMBEDDED)
    if given.weight_decay is not None:
        numbers = replace(numbers, weight_decay=given.weight_decay)
    device = pick_device(given.device)
    dtype = beforehand.dtype_of(given, device)
    chosen = {n: getattr(numbers, n) for n in NUMBERS if getattr(given, n) is None}
    settings = given.model_copy(
        update={**chosen, "size": first.frames.shape[1:3], "device": str(device),
                "dtype": SHORT[dtype]}
    )  # fmt: skip
    notes += beforehand.check_idle(given, settings, told)
    beforehand.check_runtime(settings, device, dtype)
    beforehand.check_schedule(settings)
    notes += beforehand.check_texts(settings, numbers)
    from tvkernels import sizing

    settings = settings.model_copy(update={"frames": given.frames or frames_of(given)})
    memory = sizing.check_memory(settings, numbers, device, dtype)
    sizing.check_read(settings)
    video = _read(given, size, multiple, given.frames)
    if len(video) != settings.frames:
        settings = settings.model_copy(update={"frames": len(video)})
        memory = sizing.check_memory(settings, numbers, device, dtype)
    beforehand.check_written(outputs, video)
    if not settings.audio:
        notes.append("no sound is written" + ("" if video.audio else ", and the clip has none"))
    fitting = own.fit(settings, video)
    calls = [own.call(settings, video, prompt) for prompt in settings.prompts]
    say(headline(settings))
    said = [text for name, text in said.items() if name in chosen or name not in NUMBERS]
    if said:
        say(f"for the embedded model, instead of the method's own: {', '.join(said)}")
    for line in notes:
        say(line)
    plan = sizing.plan_memory(settings, numbers, device, dtype)
    if plan is not None:
        say(str(plan))
    clock = Clock()
    with clock("load"):
        pipe = _load(settings, numbers, device, dtype, own, plan)
    if given.frames is None:
        say(whole_clip(pipe, settings, video, memory))
    cache = _cache(settings)
    for line in own.say(pipe):
        say(line)
    with beforehand.runtime_refusals(settings):
        hits = preprocess(pipe, video, settings, cache, clock, say, plan, **fitting)
    others = {"output_dir", *strangers(settings.method)}
    others |= {each.name for each in beforehand.idle(settings)}
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
        with clock("sampling"), beforehand.runtime_refusals(settings):
            pipe.set_progress_bar_config(desc="sampling", leave=False, disable=None)
            latents = sample(pipe, prompt, settings, plan, **call)
        with clock("decoding"):
            heard = sound(settings, video, output, say)
            write_video(output, decode(pipe, latents, plan), video.fps, audio=heard)
        record["settings"].update(prompts=[prompt], output=str(output), **own.record(call))
        record["seconds"] = {**clock.seconds, "total": round(time.perf_counter() - began, 2)}
        record["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        kept = output.with_suffix(".json")
        write_json(kept, record)
        say(f"wrote {output} and {kept.name} (sampled in {clock.seconds['sampling']:.1f} s)")
    return outputs


def _read(given: EditSettings, size, multiple: int, frames: int | None) -> Video:
    return read_video(
        given.clip, start=given.start, stride=given.stride, frames=frames,
        size=size, multiple=multiple, crop=given.crop,
    )  # fmt: skip


def frames_of(given: EditSettings) -> int:
    """The frames that will be taken by the times in the clip's file, 1 where it has none."""
    from tvkernels.video._decode import open_source

    with open_source(given.clip) as source:
        return max(1, len(range(given.start, source.count, given.stride)))


def headline(settings: EditSettings) -> str:
    """What is made of what, in one line."""
    height, width = settings.size
    tuning = "nothing tuned"
    if settings.tune_steps:
        tuning = f"tuning {settings.tune_steps} steps at {settings.learning_rate:g}"
    return (
        f"{settings.method}, {settings.model} model in {settings.dtype} on {settings.device}: "
        f"{settings.frames} frames of {width} x {height}, {tuning}, DDIM {settings.steps} steps, "
        f"guidance {settings.guidance:g}, seed {settings.seed}"
    )


def whole_clip(pipe: OneShotPipeline, settings: EditSettings, video: Video, memory: str) -> str:
    """One line on an edit of all frames: how many, how much memory and about how long."""
    from tvkernels.sizing import expected_seconds, spell

    length = float(len(video) / video.fps)
    parts = [f"the whole clip is taken, {len(video)} frames of {length:.3g} s", memory]
    seconds = expected_seconds(pipe, settings)
    if seconds is not None:
        parts.append(f"about {spell(seconds)} by one timed step")
    return f"{'; '.join(parts)}; --frames takes fewer"


def sound(settings: EditSettings, video: Video, output: Path, say: Say) -> Audio | None:
    """The clip's sound as far as the output keeps it, None if there is none; says what is lost."""
    if video.audio is None or not settings.audio:
        return None
    if output.suffix.lower() != ".mp4":
        say(f"the sound is left out: {output.name} holds pictures alone, an mp4 would keep it")
        return None
    return video.audio


def _load(
    settings: EditSettings, numbers: Settings, device: torch.device, dtype: torch.dtype,
    own: Front, plan: Plan | None,
) -> OneShotPipeline:  # fmt: skip
    pipe = load_pipeline(
        settings.method, model_of(settings), settings.backend, variant=settings.variant,
        dtype=dtype, device=device, offload=plan is not None and plan.offload,
        loras=[parse_lora(text) for text in settings.lora or ()],
        embeddings=settings.embedding or (), settings=numbers, **own.load(settings),
    )  # fmt: skip
    if plan is not None and plan.tile is not None:
        from tvkernels.runtime.memory import tile_vae

        tile_vae(pipe.vae, plan.tile)
    from tvkernels.runtime.files import artifacts

    # Inductor's own place is the temporary folder, which a restart empties.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(artifacts() / "inductor"))
    return pipe.accelerate(settings.runtime)


def preprocess(
    pipe: OneShotPipeline, video: Video, settings: EditSettings, cache: Cache | None,
    clock: Clock, say: Say, plan: Plan | None = None, **fitting,
) -> dict[str, str]:  # fmt: skip
    """Does what the method does before it samples, and says so.

    `fitting` is what the method's `fit` takes alone.

    Returns:
        For each stage that was done whether it came from the cache: "hit", "miss" or "off".
    """
    import torch

    tuned = is_tuned(settings)
    checkpointing = settings.gradient_checkpointing or (plan and plan.gradient_checkpointing)
    chunk = {} if plan is None else {"decode_chunk_size": plan.chunk}

    def fit() -> None:
        pipe.fit(
            video.frames, settings.source_prompt or "", num_steps=settings.tune_steps,
            learning_rate=settings.learning_rate if tuned else None,
            generator=torch.Generator().manual_seed(settings.seed),
            gradient_checkpointing=tuned and bool(checkpointing), cache=cache, **chunk, **fitting,
        )  # fmt: skip

    def invert() -> None:
        pipe.invert(
            video.frames, num_inference_steps=settings.steps, clip_skip=settings.clip_skip,
            cache=cache, **chunk,
        )  # fmt: skip

    hits = {}
    for stage, run in zip(front(settings.method).stages, (fit, invert), strict=False):
        pipe.set_progress_bar_config(desc=stage, leave=False, disable=None)
        before = cache.hits if cache else 0
        with clock(stage):
            run()
        if stage == "tuning" and not tuned:
            continue  # what `fit` did is to encode the clip
        hits[stage] = "off" if cache is None else "hit" if cache.hits > before else "miss"
        source = "taken from the cache" if hits[stage] == "hit" else "done"
        if "atlas" in fitting:
            hits[stage], source = "off", f"read from {settings.atlas_dir}"
        elif stage == "atlas" and source == "done":
            source = "made of the clip, nothing of the model is tuned or inverted,"
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
        negative_prompt=settings.negative_prompt, clip_skip=settings.clip_skip,
        split_guidance=split,
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
        return found.cpu().numpy
    host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
    host.copy_(found, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(found.device))

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
