"""C++ for CPUs, csrc/cpu/temporal_attention.cpp: reads the public layout in place."""

from __future__ import annotations

from tvkernels import _native


def why_not(q, k, v, scale) -> list[str]:
    """Every reason against this call; empty if it runs."""
    return _native.refuse("temporal_attention", q, k, v, backward="temporal_attention_backward")


def forward(q, k, v, scale):
    """Shapes as in `tvkernels.temporal_attention`; scores are never in memory."""
    return _native.load("cpu").temporal_attention(q, k, v, scale)


def backward(grads, q, k, v, scale):
    """The scores and their slopes once more, then three products, position by position."""
    return list(_native.load("cpu").temporal_attention_backward(grads[0], q, k, v, scale))
