"""The definition: EI2 eq. 9 as written, every position a clip of its own, centered first."""

from __future__ import annotations

from tvkernels.ops.spectral_linear.reference import normalised


def why_not(*args) -> list[str]:
    """The reference runs everywhere."""
    return []


def forward(z, w_q, w_k, w_v, w_out, bias, sigma_v, sigma_out, heads):
    """Shapes as in `tvkernels.shift_restricted_temporal_attention`."""
    b, f, n, c = z.shape
    clips = z.permute(0, 2, 1, 3).reshape(b * n, f, c)
    centered = clips - clips.mean(1, keepdim=True)
    q, k, v = (
        (centered @ weight.T).reshape(b * n, f, heads, c // heads).transpose(1, 2)
        for weight in (w_q, w_k, normalised(w_v, sigma_v))
    )
    scores = q @ k.transpose(2, 3) * (c // heads) ** -0.5
    attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b * n, f, c)
    linear = attended @ normalised(w_out, sigma_out).T
    out = clips + (linear if bias is None else linear + bias)
    return out.reshape(b, n, f, c).permute(0, 2, 1, 3).contiguous()
