"""Contract of guided_ddim_step: schema, fake, checks and the public functions. Torch only."""

from __future__ import annotations

import torch
from torch import Tensor

from tvkernels._dispatch import Op


def _fake(sample, noise, step, mask, background):
    return sample.new_empty(sample.shape)


OP = Op(
    "guided_ddim_step",
    "Tensor sample, Tensor noise, Tensor step, Tensor? mask, Tensor? background",
    "Tensor",
    _fake,
    backends=("cuda", "triton", "native", "cpu", "reference"),
)


def guided_ddim_step(
    sample: Tensor,
    noise: Tensor,
    step: Tensor,
    *,
    mask: Tensor | None = None,
    background: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Guidance, DDIM update and masked blend in one pass (BLD-AC, eq. 2 and 3).

    Args:
        sample: noisy latents x, [B, ...], any layout of frames and channels.
        noise: predicted noise, of sample's shape (no guidance) or [2 B, ...], the unconditional
            half first, as diffusers orders it.
        step: float32 [3] on sample's device: alpha_bar at this timestep, alpha_bar at the target
            timestep, guidance (read only where noise is [2 B, ...]). A tensor, so that one
            compiled or captured graph serves every step. The last target's alpha_bar is the
            scheduler's `final_alpha_cumprod`.
        mask: bool or in [0, 1], broadcast to sample's shape; 1 keeps the step's result.
        background: sample's shape, at the target's noise level; given with mask or not at all.
        backend: "auto" or a name; a named backend never falls back.
    Returns:
        The latents at the target timestep, of sample's shape and dtype; half inputs are computed
        in float32.
    Raises:
        ValueError: shapes or dtypes do not fit; the text says how.
        RuntimeError: an input requires gradients, which this op does not have.
        BackendError: no backend, or not the named one, can run this call.
    """
    _check(sample, noise, step)
    if noise.shape != sample.shape and noise.shape != (2 * sample.shape[0], *sample.shape[1:]):
        raise ValueError(
            "noise needs sample's shape, or twice its leading size under guidance: "
            f"{tuple(noise.shape)}, {tuple(sample.shape)}"
        )
    if (mask is None) != (background is None):
        raise ValueError("mask and background come together: give both or neither")
    if mask is not None:
        check_blend(sample, background, mask)
    return OP(sample, noise, step, mask, background, backend=backend)


def ddim_inversion_step(
    sample: Tensor, noise: Tensor, step: Tensor, *, backend: str = "auto"
) -> Tensor:
    """One step of DDIM inversion, to more noise (BLD-AC, eq. 4): eq. 2 with the levels exchanged.

    Args:
        sample: latents [B, ...] at the less noisy level.
        noise: predicted noise of sample's shape; inversion has no guidance.
        step: float32 [3] on sample's device: alpha_bar of sample, alpha_bar of the noisier target,
            and an entry that is not read, so that both directions share one table of steps.
        backend: "auto" or a name; a named backend never falls back.
    Returns:
        The latents at the noisier level, of sample's shape and dtype. `guided_ddim_step` with the
        same noise and the two alpha_bars exchanged gives sample back.
    Raises:
        ValueError: shapes or dtypes do not fit; the text says how.
        RuntimeError: an input requires gradients, which this op does not have.
        BackendError: no backend, or not the named one, can run this call.
    """
    _check(sample, noise, step)
    if noise.shape != sample.shape:
        raise ValueError(
            "noise needs sample's shape, inversion has no guidance: "
            f"{tuple(noise.shape)}, {tuple(sample.shape)}"
        )
    return OP(sample, noise, step, None, None, backend=backend)


def _check(sample: Tensor, noise: Tensor, step: Tensor) -> None:
    if sample.dim() == 0 or not sample.is_floating_point() or not noise.is_floating_point():
        raise ValueError(
            "sample and noise are floating tensors [B, ...], got "
            f"{sample.dtype} {tuple(sample.shape)}, {noise.dtype} {tuple(noise.shape)}"
        )
    if step.shape != (3,) or step.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            "step is float32 [3] (alpha_bar now, alpha_bar at the target, guidance), "
            f"got {step.dtype} {tuple(step.shape)}"
        )
    if step.device != sample.device:
        raise ValueError(f"step is on {step.device}, sample on {sample.device}: move step there")


def check_blend(foreground: Tensor, background: Tensor, mask: Tensor) -> None:
    """Checks the arguments of BLD-AC's eq. 3; raises ValueError where they do not fit."""
    if background.shape != foreground.shape or background.dtype != foreground.dtype:
        raise ValueError(
            "background needs the shape and dtype of what it blends with: "
            f"{background.dtype} {tuple(background.shape)}, "
            f"{foreground.dtype} {tuple(foreground.shape)}"
        )
    if not mask.is_floating_point() and mask.dtype != torch.bool:
        raise ValueError(f"mask is bool or floating in [0, 1], got {mask.dtype}")
    sizes = zip(mask.shape[::-1], foreground.shape[::-1], strict=False)
    if mask.dim() > foreground.dim() or any(m not in (1, size) for m, size in sizes):
        raise ValueError(
            f"mask {tuple(mask.shape)} does not broadcast to {tuple(foreground.shape)}"
        )
