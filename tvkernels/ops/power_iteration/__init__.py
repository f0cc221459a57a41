"""Power iteration: the singular vectors of a weight's largest singular value, step by step.

    v <- W^T u / |W^T u|        u <- W v / |W v|

W is [C_out, C_in], u [C_out], v [C_in]; u^T W v then estimates sigma_max(W). A product that is
zero, as those of an all-zero W, keeps the vector there was; before the first v that is the one
whose components are all C_in^(-1/2).

Sources: Miyato et al., Spectral Normalization for GANs, algorithm 1, which EI2 takes for its
eq. 8 (its ref. 29).
"""
