"""Attention over frames, at each token position by itself: no mask, no position encoding.

    out[b, :, n, h] = softmax(q[b, :, n, h] k[b, :, n, h]^T * scale) v[b, :, n, h]

q, k and v are [B, F, N, H, D]; every token position n attends over the F frames it has.

Sources: Tune-A-Video (attn_temp), TCVE, and the attention inside EI2's temporal module (eq. 3).
"""
