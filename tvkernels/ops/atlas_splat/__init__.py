"""Carries pixels into an atlas by UV: the normalised adjoint of `atlas_sample`.

    cover[t] = sum over p of S[p, t] w[p]
    atlas[t] = sum over p of S[p, t] w[p] values[p] / cover[t],    0 where cover[t] is 0

S[p, t] is the weight with which `atlas_sample` reads texel t for point p, clamping included, so
the sum is its transpose and a texel gets the mean of the pixels that show it. values is
[B, P, C], uv [B, P, 2], the weight w [B, P] in [0, 1], a layer's opacity for instance.

Source: StableVideo, eq. 5, (UV_i)^-1.
"""
