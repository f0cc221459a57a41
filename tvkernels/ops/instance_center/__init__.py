"""Instance centering: the mean over frames is taken away, per position and channel.

    IC(z)[b, f, n, c] = z[b, f, n, c] - mean over f' of z[b, f', n, c]

z is [B, F, N, C]. Space is not averaged: the paper's z is one spatial unit's temporal feature.

Source: EI2 eq. 6.
"""
