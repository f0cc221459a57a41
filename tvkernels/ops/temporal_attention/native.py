"""C++ for CPUs, csrc/cpu/temporal_attention.cpp: reads the public layout in place."""

from __future__ import annotations

from tvkernels import _native


def why_not(q, k, v, scale) -> list[str]:
    """Every reason against this call; empty if it runs."""
    return _native.refuse("temporal_attention", q, k, v)


def forward(q, k, v, scale):
    """Shapes as in `tvkernels.temporal_attention`; scores are never in memory."""
    return _native.load("cpu").temporal_attention(q, k, v, scale)
