"""Bilinear lookup of an atlas by UV: the colour that a layer shows in each pixel of a clip.

    x = ((u + 1) W - 1) / 2,  y = ((v + 1) H - 1) / 2,  clamped to [0, W - 1] and [0, H - 1]
    out[p] = sum over the four texels around (x, y) of (1 - |x - i|) (1 - |y - j|) atlas[j, i]

atlas is [B, H, W, C], uv [B, P, 2] in [-1, 1], u along the width; the outer edges of the border
texels lie at -1 and 1 (grid_sample's align_corners=False). A UV outside is clamped to the border:
it shows the border texel's centre, and its own gradient is zero.

Source: StableVideo, eq. 1 and 2; layered neural atlases (Kasten et al. 2021).
"""
