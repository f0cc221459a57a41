"""CUDA C++, csrc/kernels/shift_restricted_temporal_attention.cuh: the block in one kernel."""

from __future__ import annotations

import torch

from tvkernels import _device, _native

# As csrc/kernels/shift_restricted_temporal_attention.cuh has them.
MOST_FRAMES = 32
MOST_HEADS = 8
MOST_HEAD_DIM = 40


def why_not(z, w_q, w_k, w_v, w_out, bias, sigma_v, sigma_out, heads) -> list[str]:
    """Every reason against this call; empty if it runs."""
    given = (z, w_q, w_k, w_v, w_out, bias, sigma_v, sigma_out)
    reasons = _device.refuse("shift_restricted_temporal_attention", *given)
    if z.dtype == torch.float32:
        reasons.append("no kernel for torch.float32: float16 or bfloat16")
    frames, channels = z.shape[1], z.shape[3]
    if frames > MOST_FRAMES:
        reasons.append(f"{frames} frames are more than {MOST_FRAMES}")
    if heads > MOST_HEADS:
        reasons.append(f"{heads} heads are more than {MOST_HEADS}")
    if channels // heads > MOST_HEAD_DIM:
        reasons.append(f"a head dim of {channels // heads} is more than {MOST_HEAD_DIM}")
    if channels % 8:
        reasons.append(f"{channels} channels are no multiple of 8")
    return reasons


def forward(z, w_q, w_k, w_v, w_out, bias, sigma_v, sigma_out, heads):
    """Shapes as in `tvkernels.shift_restricted_temporal_attention`."""
    return _native.load("cuda").shift_restricted_temporal_attention(
        z, *map(_in_runs, (w_q, w_k, w_v, w_out)), bias, _sigma(w_v, sigma_v),
        _sigma(w_out, sigma_out), heads,
    )  # fmt: skip


def _in_runs(weight):
    """The weight, at most 0.2 MB, with rows that begin on 16 bytes."""
    runs = weight.stride(1) == 1 and weight.stride(0) % 8 == 0 and weight.data_ptr() % 16 == 0
    return weight if runs else weight.clone(memory_format=torch.contiguous_format)


def _sigma(weight, sigma):
    """The largest singular value as one float32 on the device; no value is read on the host."""
    return torch.linalg.svdvals(weight.float())[0] if sigma is None else sigma.float()
