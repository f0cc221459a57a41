"""Lean composed PyTorch: one pass, the background bit for bit where the mask is 0."""

from __future__ import annotations

import torch
from torch import Tensor


def why_not(*args) -> list[str]:
    """Composed of torch's own ops: runs on every device."""
    return []


def forward(foreground, background, mask):
    """Shapes as in `tvkernels.latent_blend`."""
    wide = torch.promote_types(foreground.dtype, torch.float32)
    mask = mask.to(wide)
    apart = not overlap(foreground, background) and not overlap(foreground, mask)
    if foreground.dtype == wide and apart:
        torch.lerp(background, foreground, mask, out=foreground)
    else:
        foreground.copy_(torch.lerp(background.to(wide), foreground.to(wide), mask))


def overlap(written: Tensor, read: Tensor) -> bool:
    """Whether they share memory other than element by element."""
    if written.untyped_storage()._cdata != read.untyped_storage()._cdata:
        return False
    (first, last), (low, high) = _extent(written), _extent(read)
    same = first == low and written.stride() == read.stride() and written.dtype == read.dtype
    return not same and first < high and low < last


def _extent(x: Tensor) -> tuple[int, int]:
    """Bytes of the storage from its first element to behind its last."""
    reach = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    start = x.storage_offset()
    return start * x.element_size(), (start + reach + 1) * x.element_size()
