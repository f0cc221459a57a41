"""How much memory an edit takes and how long, told before it begins."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tvkernels.beforehand import is_tuned, model_of
from tvkernels.config import ConfigError, EditSettings, parse_bytes
from tvkernels.pipelines.checks import configuration
from tvkernels.runtime.memory import (
    CHUNKS,
    OF_A_CHUNK,
    TOKENS,
    Account,
    BudgetError,
    Plan,
    plan,
    show,
)

if TYPE_CHECKING:
    from tvkernels.pipelines.one_shot import OneShotPipeline, Settings

# Longer clips are accounted for on the line through these numbers of frames: EI2 on the embedded
# model, 40 frames of 128 x 128, has 52 MB of sampling and 559 of tuning so; traced whole, which
# takes some ten times as long, 55 and 535.
FEW = (4, 8)
# More than an edit can take, which tells at once that most fit, where accounting takes seconds:
# bytes of a frame over those of its latents at the UNet's first width (EI2's tuning 279, TCVE's
# 411), and of a model as wide as Stable Diffusion's.
CRUDE, CRUDE_MODEL = 1000, 8e9
# A step of tuning over one of inversion, 8 frames on the embedded model, medians of three on one
# x86-64 core: EI2 2.9, Tune-A-Video 2.5, TCVE 3.1.
TUNING = 3
# Bytes of a pixel while a clip is read: its frames one by one and then stacked, and of one that is
# resized 4 of Pillow's more, twice over for a frame that is wide.
READ, RESIZED = 6, 20
CGROUPS = Path("/sys/fs/cgroup")


class LongAccount(Account):
    """An `Account` that takes no longer for a long clip than for a short one."""

    def __init__(self, unet, vae, text_encoder, recipe, *, frames, size, dtype):
        super().__init__(
            unet, vae, text_encoder, recipe, frames=frames, size=size, dtype=dtype
        )  # fmt: skip
        self._few = [
            Account(unet, vae, text_encoder, recipe, frames=count, size=size, dtype=dtype)
            for count in (FEW if frames > FEW[-1] else ())
        ]

    def of(self, frames: int) -> LongAccount:
        """Of the same edit with another number of frames, more than `FEW` of this one's too."""
        other = copy.copy(self)
        other.frames = frames
        other._seen = {key: size for key, size in self._seen.items() if key[0] in OF_A_CHUNK}
        other.__dict__.pop("_tables", None)
        return other

    def sampling(self, clips: int, calls: int = 1) -> int:
        """As `Account.sampling`."""
        return self._line("sampling", clips, calls)

    def tuning(self, checkpointing: bool) -> int:
        """As `Account.tuning`."""
        return self._line("tuning", checkpointing)

    def _line(self, name: str, *args) -> int:
        if not self._few:
            return getattr(super(), name)(*args)
        low, high = (getattr(account, name)(*args) for account in self._few)
        return low + (high - low) * (self.frames - FEW[0]) // (FEW[1] - FEW[0])


def why_not(settings: EditSettings) -> str:
    """Why an edit's memory is not accounted for; "" where it is."""
    if settings.method == "stable-video":
        return "of an atlas is not accounted for"
    if settings.runtime != "eager":
        return f"under {settings.runtime} is not accounted for"
    kind = configuration(model_of(settings), "vae").get("_class_name", "AutoencoderKL")
    return "" if kind == "AutoencoderKL" else f"of an {kind} is not accounted for"


def account_of(settings: EditSettings, numbers: Settings, dtype: torch.dtype) -> LongAccount:
    """From the model's configuration files alone.

    Raises:
        ModelError: the model has no such files.
    """
    parts = (configuration(model_of(settings), part) for part in ("unet", "vae", "text_encoder"))
    return LongAccount(
        *parts, numbers.recipe, frames=settings.frames, size=settings.size, dtype=dtype
    )


def peak(settings: EditSettings, account: LongAccount) -> int:
    """Bytes of the edit's largest stage, weights included, without a plan."""
    guided, checkpointing = settings.guidance > 1, settings.gradient_checkpointing
    stages = [account.coding(min(CHUNKS[0], account.frames))]
    if is_tuned(settings):
        stages.append(account.tuning(checkpointing))
    if not is_tuned(settings) or checkpointing:  # without, tuning takes several times as much
        stages.append(account.sampling(1 + guided) + kept(settings, account))
    return account.weight_bytes() + max(stages)


def kept(settings: EditSettings, account: Account) -> int:
    """What blended diffusion keeps of every step: latents, and a map for each of the tokens."""
    if settings.method != "blended-diffusion":
        return 0
    channels, height, width = account.latents
    maps = TOKENS * (height // 2) * (width // 2) if settings.mask is None else 0
    return 4 * account.frames * (settings.steps + 1) * (channels * height * width + maps)


def check_side(side: int) -> None:
    """Whether a frame can be read whose shorter side has so many pixels.

    Raises:
        ConfigError: it takes more than is free.
    """
    free, needed = free_memory(torch.device("cpu")), RESIZED * side**2
    if free is not None and needed > free:
        raise ConfigError(
            f"--size {side}: a frame of that size takes {show(needed)}, {show(free)} are free: "
            "ask for a smaller one"
        )


def check_read(settings: EditSettings) -> None:
    """Whether memory holds the frames that are read.

    Raises:
        ConfigError: it does not; the text says how many would do.
    """
    free, height, width = free_memory(torch.device("cpu")), *settings.size
    most = None if free is None else free // (READ * height * width)
    if most is not None and settings.frames > most:
        raise ConfigError(
            f"{settings.frames} frames of {width} x {height} are more than the {show(free)} that "
            f"are free hold: ask for --frames {max(1, most)} or fewer, or for a smaller --size"
        )


def check_memory(
    settings: EditSettings, numbers: Settings, device: torch.device, dtype: torch.dtype
) -> str:
    """What the edit takes by accounting, in a few words; roughly where much more is free.

    Args:
        settings: whole, with all frames.
        numbers: the method's.
        device, dtype: what it runs on and in.
    Raises:
        ConfigError: more than is free; the text says how many frames would do.
    """
    if settings.max_memory is not None:
        return f"memory under {settings.max_memory} as planned"
    if reason := why_not(settings):
        return f"memory {reason}"
    free = free_memory(device)
    width = configuration(model_of(settings), "unet")["block_out_channels"][0]
    height, across = settings.size
    frame = CRUDE * width * height * across // 64 * dtype.itemsize
    rough = int(CRUDE_MODEL * (width / 320) ** 2 + settings.frames * frame)
    if free is not None and rough <= free:
        return f"memory under {show(rough)} by rough accounting"
    account = account_of(settings, numbers, dtype)
    needed = peak(settings, account)
    if free is None or needed <= free:
        return f"memory {show(needed)} by accounting"
    low, high = 0, settings.frames
    while high - low > 1:  # `low` fits, `high` does not
        middle = (low + high) // 2
        fits = peak(settings, account.of(middle)) <= free
        low, high = (middle, high) if fits else (low, middle)
    most = f"ask for --frames {low} or fewer, " if low else ""
    raise ConfigError(
        f"{settings.frames} frames of {across} x {height} take {show(needed)} by accounting, "
        f"{show(free)} are free on {device}: {most}a smaller --size, or --max-memory, which plans "
        "for what there is"
    )


def plan_memory(
    settings: EditSettings, numbers: Settings, device: torch.device, dtype: torch.dtype
) -> Plan | None:
    """How the edit keeps under `max_memory`, None where that is not asked for.

    Raises:
        ConfigError: it cannot; the text names the least that would do.
        ModelError: the model has no configuration to account from.
    """
    if settings.max_memory is None:
        return None
    if reason := why_not(settings):
        raise ConfigError(f"--max-memory: memory {reason}: leave it out")
    try:
        return plan(
            parse_bytes(settings.max_memory), account_of(settings, numbers, dtype),
            tune=is_tuned(settings), guided=settings.guidance > 1,
            checkpointing=settings.gradient_checkpointing, device=device.type,
        )  # fmt: skip
    except BudgetError as error:
        raise ConfigError(f"max_memory: {error}") from None


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device: on a CPU what the system and its control group leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "xpu":
        try:
            return torch.xpu.mem_get_info(device)[0]
        except RuntimeError:  # not every driver tells
            return None
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        import psutil
    except ImportError:  # it comes with accelerate
        return None
    return min([psutil.virtual_memory().available, *_group_memory()])


def _group_memory() -> list[int]:
    """Bytes that the process's control group, a container's for instance, leaves of its limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    own = next((line.split(":", 2)[2].lstrip("/") for line in lines if line[:3] == "0::"), "")
    found = []
    for place, limit, used in (
        (CGROUPS / own, "memory.max", "memory.current"),
        (CGROUPS, "memory.max", "memory.current"),
        (CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            left = int((place / limit).read_text(encoding="utf-8")) - int(
                (place / used).read_text(encoding="utf-8")
            )
            stat = dict(
                line.split()
                for line in (place / "memory.stat").read_text(encoding="utf-8").splitlines()
            )
        except (OSError, ValueError):  # no such group, or one without a limit: "max"
            continue
        found.append(max(0, left + int(stat.get("inactive_file", 0))))  # files' pages are given up
    return found


def expected_seconds(pipe: OneShotPipeline, settings: EditSettings) -> float | None:
    """Seconds of the whole edit by one call of the UNet and one of the VAE, timed here and now.

    None where a runtime would have to be prepared for that, and for key frames not known yet.
    """
    if settings.runtime != "eager" or settings.method == "stable-video":
        return None
    frames, (height, width) = min(2, settings.frames), settings.size
    device, unet = pipe._execution_device, pipe.unet
    like = {"device": device, "dtype": unet.dtype}
    latents = torch.zeros(frames, 4, height // pipe.multiple, width // pipe.multiple, **like)
    text = torch.zeros(1, TOKENS, unet.config.cross_attention_dim, **like)
    told = {"num_frames": frames}
    with torch.no_grad():
        step = _seconds(lambda: unet(latents, 1, text, cross_attention_kwargs=told), device)
        frame = latents[:1].to(pipe.vae.dtype)
        picture = _seconds(lambda: pipe.vae.decode(frame), device)
    pipe.maybe_free_model_hooks()
    prompts = len(settings.prompts)
    steps = settings.steps * (1 + prompts * (1 + (settings.guidance > 1)))
    steps += TUNING * settings.tune_steps
    return settings.frames * (step / frames * steps + picture * (2 + prompts))


def _seconds(call, device: torch.device) -> float:
    """Of the second of two calls."""
    for _ in range(2):
        began = time.perf_counter()
        call()
        if device.type == "mps":
            torch.mps.synchronize()
        elif device.type != "cpu":
            getattr(torch, device.type).synchronize(device)
    return time.perf_counter() - began


def spell(seconds: float) -> str:
    """ "40 s", "12 min" or "3.5 h"."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
