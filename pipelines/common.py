"""What the pipelines share: how their methods run, frames to latents and back, DDIM tables."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from tvkernels._ranges import span
from tvkernels.devices import memory_advice
from tvkernels.pipelines.checks import ModelError

BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")  # that DDIM works out by itself
ROUNDING = 1e-3  # beyond [0, 1] that a resized or composed picture may lie


@dataclass
class VideoEditOutput(BaseOutput):
    """The edited clip: [[PIL, ...]], np [1, F, H, W, 3], pt [1, F, 3, H, W] or latents."""

    frames: list | np.ndarray | Tensor


def working(gradients: bool = False):
    """Decorates a pipeline's method: the same results whatever mode the caller is in.

    Inside gradients are on or off as asked, autocast and inference mode are off, and a lack of
    memory comes with what to lower.
    """

    def decorate(method):
        @functools.wraps(method)
        def run(self, *args, **kwargs):
            with (
                memory_advice(),
                torch.inference_mode(False),
                torch.set_grad_enabled(gradients),
                torch.autocast(self._execution_device.type, enabled=False),
            ):
                return method(self, *args, **kwargs)

        return run

    return decorate


@torch.no_grad()
def make_tunable(model: nn.Module) -> None:
    """Copies what was loaded under inference mode, which nothing outside of it may change."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_inference():
            copy = tensor.clone()
            if isinstance(tensor, nn.Parameter):
                copy = nn.Parameter(copy, tensor.requires_grad)
            torch.utils.swap_tensors(tensor, copy)  # layers that were replaced share it


def ddim_schedulers(scheduler) -> tuple[DDIMScheduler, DDIMInverseScheduler]:
    """DDIM and its inversion with a model's own noise schedule.

    From the model's configuration: the constructors' defaults clip samples and end at alpha 1,
    which no SD-1.x model was trained with. Of timesteps, "leading" stands in for "linspace",
    which DDIM's inversion does not have.

    Raises:
        ModelError: a schedule that DDIM cannot follow: without betas (flow matching, EDM), with
            other noise levels than its betas give, or one that ends in noise alone; or a model
            that predicts something other than the noise.
    """
    kind, config = type(scheduler).__name__, dict(scheduler.config)
    ours = {"clip_sample": False, "set_alpha_to_one": False}
    if config.get("timestep_spacing") == "linspace":
        ours["timestep_spacing"] = "leading"
    if config.get("beta_schedule") not in BETAS and config.get("trained_betas") is None:
        ours["trained_betas"] = getattr(scheduler, "betas", torch.zeros(0)).tolist()
    # from_config drops what its list says was left at a default, ours too if it stands there.
    left = [name for name in config.get("_use_default_values", ()) if name not in ours]
    config.update(ours, _use_default_values=left)
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise ModelError(
            f"the model predicts {config['prediction_type']}, these methods need epsilon: "
            "give a Stable Diffusion 1.x model"
        )
    own = getattr(scheduler, "alphas_cumprod", None)
    if own is None or config.get("use_flow_sigmas"):
        raise ModelError(
            f"{kind} has noise levels that are not of DDIM (flow matching or EDM): give a "
            "scheduler of Stable Diffusion 1.x, such as DDIMScheduler"
        )
    ddim = DDIMScheduler.from_config(config)
    alphas = ddim.alphas_cumprod
    if not alphas.min() > 0:
        raise ModelError(
            f"the schedule of {kind} ends in noise alone (zero terminal SNR), from which epsilon "
            "tells nothing: set rescale_betas_zero_snr=False"
        )
    steps = ddim.config.num_train_timesteps
    # A few rounding steps of a product of a thousand factors.
    if (
        len(alphas) != steps
        or own.shape != alphas.shape
        or not own.to(alphas).allclose(alphas, 1e-4)
    ):
        raise ModelError(
            f"the noise levels of {kind} are not what its {steps} betas give, DDIM cannot follow "
            "them: give a scheduler of Stable Diffusion 1.x, such as DDIMScheduler"
        )
    return ddim, DDIMInverseScheduler.from_config(config)


def ddim_table(scheduler, steps: int, guidance: float, device) -> tuple[Tensor, Tensor]:
    """Timesteps [steps] and float32 rows [steps, 3] of (alpha_bar, target alpha_bar, guidance).

    Rows are what `tvkernels.guided_ddim_step` reads; both directions, by the scheduler's class.

    Raises:
        ValueError: no step, more than the schedule has, or a guidance that is no number.
    """
    least, most = 1, scheduler.config.num_train_timesteps
    if not isinstance(steps, int) or not least <= steps <= most:
        raise ValueError(f"{steps!r} steps: ask for a whole number from {least} to {most}")
    if not 0 <= guidance < float("inf"):
        raise ValueError(f"guidance {guidance}: ask for 0 or more")
    scheduler.set_timesteps(steps)
    if scheduler.timesteps.max() >= most:
        raise ValueError(f"{steps} steps are more than the schedule has: ask for {steps - 1}")
    timesteps = scheduler.timesteps.to(device)
    alphas = scheduler.alphas_cumprod.to(device)
    stride = scheduler.config.num_train_timesteps // steps
    if isinstance(scheduler, DDIMInverseScheduler):
        source, end = timesteps - stride, scheduler.initial_alpha_cumprod
        alpha, target = _alpha(alphas, source, end), alphas[timesteps]
    else:
        target = _alpha(alphas, timesteps - stride, scheduler.final_alpha_cumprod)
        alpha = alphas[timesteps]
    rows = torch.stack([alpha, target, torch.full_like(alpha, guidance)], 1)
    return timesteps, rows.float()


def _alpha(alphas: Tensor, timesteps: Tensor, end) -> Tensor:
    inside = alphas[timesteps.clamp(0, len(alphas) - 1)]
    return torch.where(timesteps >= 0, inside, torch.as_tensor(end, device=alphas.device))


def frames_to_tensor(video, multiple: int) -> Tensor:
    """A clip as float32 [F, 3, H, W] in [-1, 1].

    Args:
        video: uint8 [F, H, W, 3], PIL images, or a tensor [F, 3, H, W], float in [0, 1] or uint8.
        multiple: what both sides must divide by.
    Raises:
        ValueError: no frames, frames of several sizes, sides that do not divide, or values outside
            of [0, 1].
    """
    if isinstance(video, Sequence) and len(video) and isinstance(video[0], PIL.Image.Image):
        sizes = {frame.size for frame in video}
        if len(sizes) > 1:
            raise ValueError(f"the frames have several sizes: {sorted(sizes)}")
        video = np.stack([np.asarray(frame.convert("RGB")) for frame in video])
    if isinstance(video, np.ndarray) and video.dtype == np.uint8 and video.ndim == 4:
        video = torch.from_numpy(np.ascontiguousarray(video)).permute(0, 3, 1, 2)
    if not isinstance(video, Tensor) or video.dim() != 4 or video.shape[1] != 3 or not len(video):
        raise ValueError(
            "video must be uint8 [F, H, W, 3], PIL images, or a tensor [F, 3, H, W], float in "
            "[0, 1] or uint8, with one frame or more"
        )
    if video.dtype == torch.uint8:
        video = video.float().div_(255)
    h, w = video.shape[2:]
    if h % multiple or w % multiple or not h * w:
        raise ValueError(f"frames of {w}x{h} pixels: both sides must be multiples of {multiple}")
    low, high = video.aminmax()
    if not (video.is_floating_point() and low >= -ROUNDING and high <= 1 + ROUNDING):
        raise ValueError(
            f"values of {video.dtype} in [{low:.4g}, {high:.4g}]: give a clip as floats in [0, 1]"
        )
    return (video.float() * 2).sub_(1)


@torch.no_grad()
def encode_frames(vae, pixels: Tensor, chunk: int = 8) -> Tensor:
    """[F, 3, H, W] in [-1, 1] -> scaled latents [F, 4, h, w], the posterior's mode."""
    parts = []
    for part in pixels.split(chunk):
        found = vae.encode(part.to(vae.dtype))
        # AutoencoderTiny gives latents, not their distribution.
        parts.append(found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents)
    scale, shift = _scaling(vae)
    return (widened(torch.cat(parts)) - shift) * scale


def widened(x: Tensor) -> Tensor:
    """In float32, or float64 if it was."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scaling(vae) -> tuple[float, float]:
    config = vae.config
    return config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0


def decode_chunks(vae, latents: Tensor, chunk: int = 8) -> Iterator[Tensor]:
    """Scaled latents [F, 4, h, w] -> float32 pixels [n, 3, H, W] in [0, 1], n <= chunk frames.

    A chunk is decoded when it is asked for: the clip is never in memory whole.
    """
    scale, shift = _scaling(vae)
    for part in latents.split(chunk):
        with span("method", "decode"), torch.no_grad():
            pixels = vae.decode((part / scale + shift).to(vae.dtype)).sample
            pixels = pixels.float().div_(2).add_(0.5).clamp_(0, 1)
        yield pixels


def decode_latents(vae, latents: Tensor, chunk: int = 8) -> Tensor:
    """Scaled latents [F, 4, h, w] -> float32 pixels [F, 3, H, W] in [0, 1]."""
    return torch.cat(list(decode_chunks(vae, latents, chunk)))
