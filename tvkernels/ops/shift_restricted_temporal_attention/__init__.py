"""STAM, the temporal module that restricts covariate shift.

    STAM(z) = z + A(IC(z)) W_out^T / sigma_out + b
    A(x) = softmax(x W_q^T (x W_k^T)^T / sqrt(D)) x W_v^T / sigma_v    over frames, for each head

z is [B, F, N, C], the weights [C, C] as torch keeps them, D = C / heads, IC the centering over
frames. sigma is the largest singular value of its weight.

Source: EI2 eq. 3, 6, 8 and 9.
"""
