"""CUDA C++, csrc/kernels/temporal_attention.cuh: scores in registers, tensors read in place."""

from __future__ import annotations

from tvkernels import _device, _native

# As csrc/kernels/temporal_attention.cuh has them.
MOST_FRAMES = 32
MOST_HEAD_DIM = 160


def why_not(q, k, v, scale) -> list[str]:
    """Every reason against this call; empty if it runs."""
    reasons = _device.refuse("temporal_attention", q, k, v)
    if q.shape[1] > MOST_FRAMES:
        reasons.append(f"{q.shape[1]} frames are more than {MOST_FRAMES}")
    if q.shape[4] > MOST_HEAD_DIM:
        reasons.append(f"a head dim of {q.shape[4]} is more than {MOST_HEAD_DIM}")
    return reasons


def forward(q, k, v, scale):
    """Shapes as in `tvkernels.temporal_attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None and q.shape[-1] else scale
    return _native.load("cuda").temporal_attention(q, k, v, 1.0 if scale is None else scale)
