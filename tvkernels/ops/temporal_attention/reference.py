"""The definition, as published code runs it: positions become a batch of clips of one token."""

from __future__ import annotations


def why_not(*args) -> list[str]:
    """The reference runs everywhere."""
    return []


def forward(q, k, v, scale):
    """Shapes as in `tvkernels.temporal_attention`; all scores are held at once."""
    b, f, n, h, d = q.shape
    scale = d**-0.5 if scale is None else scale
    q, k, v = (x.permute(0, 2, 3, 1, 4).reshape(b * n, h, f, d) for x in (q, k, v))
    out = (q @ k.transpose(2, 3) * scale).softmax(-1) @ v
    return out.reshape(b, n, h, f, d).permute(0, 3, 1, 2, 4).contiguous()
