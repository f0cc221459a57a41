"""Cross-attention that also returns where the image looks at chosen words.

    p[b, f, n, h, :] = softmax(q[b, f, n, h] k[b, :, h]^T * scale)
    out = p v,    maps[b, f, n, t] = mean over heads of p[b, f, n, h, tokens[t]]

q is [B, F, N, H, D]; the text's k and v are [B, L, H, D], shared by the frames; tokens is int64
[T]. The map of all words is never held for more than one frame.

Source: blended latent diffusion under attention control, eq. 5 (masks from these maps at a
threshold of 0.3).
"""
