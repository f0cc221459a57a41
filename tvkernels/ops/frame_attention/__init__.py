"""Attention of every frame over the frames its pattern names, fine or average-pooled.

    out[f] = softmax(q[f] K_f^T * scale + bias_f) V_f

K_f and V_f are the pattern's segments of frame f one after another: tokens of a frame at full
resolution (level 0) or averaged r x r over the (h, w) grid (level r; a ragged edge averages what
is there). bias_f is log(count) of a frame named several times, plus log(pooled count) where the
pattern asks for it. q is [B, Fq, N, H, D], k and v are [B, F, N, H, D], Fq may be smaller than F.

Sources: EI2 eq. 10 (fine-coarse), Tune-A-Video (first and previous frame), blended latent
diffusion under attention control eq. 6 (previous and own frame).
"""
