"""Named cases of temporal_conv: TCVE's temporal U-Net over SD-1.x's latents, and odd shapes."""

from __future__ import annotations

import math

from tvkernels.testing.spec import OpSpec


def _case(
    b, f, c, h, w, out=None, kernel=3, groups=4, stride=1, frames=None,
    norm=True, bias=True, residual=True, layout="bfchw",
):  # fmt: skip
    frames = f if frames is None else frames
    return {
        "shape": (b, f, c, h, w), "out": out or c, "kernel": kernel, "groups": groups,
        "stride": stride, "frames": frames, "norm": norm, "bias": bias, "residual": residual,
        "layout": layout,
    }  # fmt: skip


def result_shape(case):
    """[B, F', O, h, w] of a case."""
    b, _, _, h, w = case["shape"]
    return b, (case["frames"] - 1) // case["stride"] + 1, case["out"], h, w


def _plain(*shape, **kwargs):
    return _case(*shape, norm=False, residual=False, **kwargs)


def _sd(c, f, side=64, b=2, **kwargs):
    return _case(b, f, c, side, side, groups=32, **kwargs)


CASES = {
    "block": _case(2, 3, 8, 3, 6),
    "odd_frames": _case(1, 5, 6, 2, 4, out=10, groups=3),
    "one_frame": _case(2, 1, 8, 2, 3, groups=1),
    "channel_groups": _case(1, 4, 4, 2, 2, residual=False),
    "plain": _plain(2, 3, 6, 3, 4, out=4),
    "shortcut": _plain(1, 3, 8, 5, 3, out=5, kernel=1),
    "input": _plain(2, 3, 4, 2, 5, out=32, kernel=7),
    "seven_taps": _plain(1, 9, 20, 3, 2, out=6, kernel=7),
    "down": _plain(1, 6, 8, 3, 4, stride=2, bias=False),
    "down_odd": _case(1, 5, 8, 3, 4, stride=2, out=6),
    "up": _plain(1, 3, 8, 3, 4, frames=6),
    "up_odd": _case(1, 3, 8, 3, 4, frames=5),
    "up_down": _plain(1, 4, 6, 2, 3, frames=7, stride=2),
    "channels_last": _case(1, 3, 8, 3, 4, layout="bfhwc"),
    "frames_last": _case(1, 4, 8, 3, 2, layout="bhwcf"),
    "turned": _case(1, 2, 8, 3, 6, layout="bfcwh"),  # rows do not follow each other
    "no_frame": _case(1, 0, 8, 4, 4),
    "no_batch": _case(0, 3, 8, 4, 4),
    # 16 frames: every block of the published U-Net is one of these but for its channels.
    "sd15-320-16f": _sd(320, 16),
    "sd15-640-8f": _sd(640, 8),
    "sd15-1280-4f": _sd(1280, 4),
    "sd15-1280-2f": _sd(1280, 2),
    "sd15-2560-2f": _sd(2560, 2, out=1280),
    "sd15-input": _plain(2, 16, 4, 64, 64, out=320, kernel=7),
    "sd15-down-320": _plain(2, 16, 320, 64, 64, stride=2),
    "sd15-up-1280": _plain(2, 4, 1280, 64, 64, frames=8),
    "sd15-shortcut-960": _plain(2, 16, 960, 64, 64, out=320, kernel=1),
    "sd15-320-60x60": _sd(320, 16, 60, b=1),
    "sd15-320-channels_last": _sd(320, 16, layout="bfhwc"),
}


def inputs(case, make):
    """The clip, weight and bias of one case, and what surrounds the convolution."""
    sizes = dict(zip("bfchw", case["shape"], strict=True))
    x = make(*(sizes[axis] for axis in case["layout"]))
    x = x.permute(*(case["layout"].index(axis) for axis in "bfchw"))
    c, out, kernel = sizes["c"], case["out"], case["kernel"]
    weight = make(out, c, kernel, scale=(c * kernel) ** -0.5, plain=True)
    options = {name: case[name] for name in ("groups", "stride", "frames")}
    if case["norm"]:
        options |= {"norm_weight": make(c), "norm_bias": make(c)}
    options["residual"] = make(*result_shape(case)) if case["residual"] else None
    return [x, weight, make(out) if case["bias"] else None], options


def _read(case):
    return math.prod(case["shape"])


def _made(case):
    return math.prod(result_shape(case))


def _taps(case):
    """Products of two channels that meet a frame inside the clip."""
    half, shape = case["kernel"] // 2, result_shape(case)
    met = sum(
        0 <= f * case["stride"] + k - half < case["frames"]
        for f in range(shape[1])
        for k in range(case["kernel"])
    )
    return met * shape[0] * case["shape"][2] * case["out"] * math.prod(shape[3:])


def _bytes(case):
    weights = case["shape"][2] * case["out"] * case["kernel"] + 3 * case["shape"][2]
    return 2 * (_read(case) + (1 + case["residual"]) * _made(case) + weights)


def _case_of(x, weight, bias, norm, shift, residual, groups, eps, stride, frames):
    return {
        "shape": tuple(x.shape),
        "out": weight.shape[0],
        "kernel": weight.shape[2],
        "stride": stride,
        "frames": frames,
        "norm": norm is not None,
        "residual": residual is not None,
    }


SPEC = OpSpec(
    name="temporal_conv",
    cases=CASES,
    inputs=inputs,
    case_of=_case_of,
    # of the norm and SiLU: nine an element, as clip_group_norm counts them
    flops=lambda case: 2 * _taps(case) + 9 * case["norm"] * _read(case),
    bytes=_bytes,
    exps=lambda case: case["norm"] * _read(case),
    gradients=(0, 1, 2, "norm_weight", "norm_bias", "residual"),
)
