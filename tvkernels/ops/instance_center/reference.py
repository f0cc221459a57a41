"""The definition: EI2 eq. 6 on the temporal features of each position."""

from __future__ import annotations


def why_not(*args) -> list[str]:
    """The reference runs everywhere."""
    return []


def forward(z):
    """Shapes as in `tvkernels.instance_center`."""
    b, f, n, c = z.shape
    clips = z.permute(0, 2, 1, 3).reshape(b * n, f, c)
    clips = clips - clips.mean(1, keepdim=True)
    return clips.reshape(b, n, f, c).permute(0, 2, 1, 3).contiguous()
