"""Group normalisation of a clip: statistics over a group's channels, all frames and space.

    y = (x - mean) / sqrt(var + eps) * weight + bias,    then y * sigmoid(y) under silu

x is [B, F, C, h, w]; mean and (biased) var are [B, groups]. It is what `nn.GroupNorm` computes on
the [B, C, F, h, w] of the inflated residual blocks, without bringing the frames there and back.

Source: the released code of Tune-A-Video (resnet.py) and its descendants; Wu and He,
group normalization.
"""
