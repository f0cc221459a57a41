"""Named cases of clip_group_norm: the residual blocks of SD-1.x's UNet, and odd shapes."""

from __future__ import annotations

import math

from tvkernels.testing.spec import OpSpec


def _case(b, f, c, h, w, groups=32, silu=True, layout="bfchw"):
    return {"shape": (b, f, c, h, w), "groups": groups, "silu": silu, "layout": layout}


CASES = {
    "silu": _case(2, 3, 8, 4, 5, groups=4),
    "plain": _case(1, 3, 6, 3, 4, groups=3, silu=False),
    "one_frame": _case(2, 1, 8, 4, 4, groups=2),
    "one_group": _case(1, 2, 5, 3, 7, groups=1),
    "channel_groups": _case(1, 3, 4, 4, 2, groups=4, silu=False),
    "channels_last": _case(1, 2, 6, 4, 5, groups=2, layout="bfhwc"),
    "turned": _case(2, 2, 6, 4, 5, groups=2, layout="bfcwh"),  # rows do not follow each other
    "no_frame": _case(1, 0, 8, 4, 4, groups=4),
    "no_batch": _case(0, 3, 8, 4, 4, groups=4),
    **{
        f"sd15-{c}-{side}": _case(2, 16, c, side, side)
        for c, side in ((320, 64), (960, 64), (640, 32), (1280, 16), (2560, 8))
    },
    "sd15-320-64-channels_last": _case(2, 16, 320, 64, 64, layout="bfhwc"),
    "sd15-320-54x96": _case(1, 16, 320, 54, 96, silu=False),
}


def inputs(case, make):
    """The clip, weight and bias of one case."""
    sizes = dict(zip("bfchw", case["shape"], strict=True))
    x = make(*(sizes[axis] for axis in case["layout"]))
    x = x.permute(*(case["layout"].index(axis) for axis in "bfchw"))
    c = sizes["c"]
    args = [x, make(c), make(c), case["groups"]]
    return args, {"silu": case["silu"]}


def _size(case):
    return math.prod(case["shape"])


SPEC = OpSpec(
    name="clip_group_norm",
    cases=CASES,
    inputs=inputs,
    case_of=lambda x, w, b, groups, eps, silu: {"shape": tuple(x.shape), "silu": silu},
    # mean, centred square, scale and shift: six an element, and three for y * sigmoid(y)
    flops=lambda case: (6 + 3 * case["silu"]) * _size(case),
    bytes=lambda case: 2 * (2 * _size(case) + 2 * case["shape"][2]),
    exps=lambda case: case["silu"] * _size(case),
    gradients=(0, 1, 2),
)
