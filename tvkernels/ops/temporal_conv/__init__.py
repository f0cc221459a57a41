"""A convolution over the frames of a clip, each position for itself, with what surrounds it.

    y = SiLU(GroupNorm(x)),   out[f] = sum_k W_k y[r(stride f + k - K // 2)] + bias + residual[f]

x is [B, F, C, h, w]. The group norm's statistics are of one position: over a group's channels and
the F frames. r reads y as if it had been resized over frames to another length by nearest
neighbours, r(v) = v F // length, and zero outside [0, length); so nothing is resized. W_k is
[O, C], K odd. A stride of 2 halves the frames, rounding up. Norm, bias and residual may be left
out; without the norm there is no SiLU.

Sources: TCVE, section IV-B (temporal U-Net), and its released code, which runs it on
(b h w) c f; He et al., residual blocks; Wu and He, group normalization.
"""
