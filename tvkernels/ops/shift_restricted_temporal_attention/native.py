"""C++ for CPUs, csrc/cpu/shift_restricted_temporal_attention.cpp: some positions at a time."""

from __future__ import annotations

from tvkernels import _native
from tvkernels.ops.spectral_linear.reference import normalised


def why_not(z, w_q, w_k, w_v, w_out, bias, sigma_v, sigma_out, heads) -> list[str]:
    """Every reason against this call; empty if it runs."""
    return _native.refuse("shift_restricted_temporal_attention", z, w_q, w_k, w_v, w_out, bias)


def forward(z, w_q, w_k, w_v, w_out, bias, sigma_v, sigma_out, heads):
    """Shapes as in `tvkernels.shift_restricted_temporal_attention`."""
    w_v, w_out = normalised(w_v, sigma_v), normalised(w_out, sigma_out)
    ops = _native.load("cpu")
    return ops.shift_restricted_temporal_attention(z, w_q, w_k, w_v, w_out, bias, heads)
