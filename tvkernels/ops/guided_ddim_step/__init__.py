"""One deterministic DDIM step with classifier-free guidance and an optional masked blend.

    eps = eps_u + g (eps_t - eps_u)            (only where noise holds both halves)
    x0  = (x - sqrt(1 - a) eps) / sqrt(a)
    x'  = sqrt(a') x0 + sqrt(1 - a') eps
    x'' = x' m + background (1 - m)            (only where a mask is given)

a and a' are the cumulative products of alpha at this timestep and at the target. Denoising has
a' > a, inversion a' < a: equation 4 of the paper is equation 2 with the two exchanged, so both are
one op, and with the same eps one undoes the other.

Sources: DDIM eq. 12 at eta = 0; blended latent diffusion under attention control eq. 2 (step),
eq. 3 (blend), eq. 4 (inversion).
"""
