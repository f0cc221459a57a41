"""Blends the latents of an edit into those of its source, in place: z_fg m + z_bg (1 - m).

foreground and background have one shape and dtype; the mask broadcasts to it.

Source: blended latent diffusion under attention control, eq. 3.
"""
