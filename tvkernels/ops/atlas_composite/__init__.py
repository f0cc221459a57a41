"""Layers of a clip over each other: foregrounds by their opacity, the background behind them.

    out = sum over l of T[l] alpha[l] layers[l],    T[l] = product over k < l of (1 - alpha[k])

with alpha = 1 for the last layer, the background. layers is [B, L, P, C] from front to back, alpha
[B, L - 1, P] in [0, 1]. With one foreground it is alpha F + (1 - alpha) B.

Source: StableVideo, eq. 3; several foregrounds by Porter and Duff's over.
"""
