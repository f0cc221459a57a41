"""A linear map whose weight is divided by its largest singular value.

    y = x W^T / sigma + b

x is [..., C_in], W [C_out, C_in] as torch keeps it, b [C_out], sigma one number: the exact largest
singular value, or the estimate that `power_iteration` keeps up in training. Where sigma is 0, as
for an all-zero W, the quotient counts as 0: y = b, and every gradient is finite.

Sources: EI2 eq. 8; Miyato et al., Spectral Normalization for GANs, algorithm 1 (EI2's ref. 29).
"""
