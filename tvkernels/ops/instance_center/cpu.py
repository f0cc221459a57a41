"""Lean composed PyTorch: one reduction and one subtraction in the public layout."""

from __future__ import annotations


def why_not(*args) -> list[str]:
    """Composed of torch's own ops: runs on every device."""
    return []


def forward(z):
    """Shapes as in `tvkernels.instance_center`."""
    return (z - z.mean(1, keepdim=True)).contiguous()


def backward(grads, z):
    """Centering is a symmetric projection: its gradient is the centered gradient."""
    grad = grads[0]
    return [grad - grad.mean(1, keepdim=True)]
