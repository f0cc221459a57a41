"""Named cases of atlas_sample: a clip's layers, and odd shapes."""

from __future__ import annotations

from tvkernels.testing.spec import OpSpec


def _case(b, h, w, c, p):
    return {"atlas": (b, h, w, c), "points": p}


CASES = {
    "colour": _case(2, 5, 7, 3, 33),
    "one_texel": _case(1, 1, 1, 2, 9),
    "one_row": _case(1, 1, 6, 4, 12),
    "features": _case(1, 4, 3, 19, 21),
    "no_point": _case(2, 4, 4, 3, 0),
    "no_batch": _case(0, 4, 4, 3, 5),
    "no_channel": _case(1, 4, 4, 0, 5),
    "sd15-768x432": _case(1, 2000, 2000, 3, 16 * 432 * 768),  # the paper's atlas and frames
    "sd15-512": _case(1, 1024, 1024, 4, 16 * 512 * 512),
    "sd15-mapping": _case(16, 64, 64, 2, 512 * 512),  # a frame's field of UV, read in its pixels
}


def inputs(case, make):
    """Atlas and UV, a fifth of them outside."""
    uv = 2.5 * make(case["atlas"][0], case["points"], 2, positive=True) - 1.25
    return [make(*case["atlas"]), uv], {}


def _results(case):
    return case["atlas"][0] * case["points"] * case["atlas"][3]


def _bytes(case):
    b, h, w, c = case["atlas"]
    return 2 * (b * h * w * c + 2 * b * case["points"] + _results(case))


SPEC = OpSpec(
    name="atlas_sample",
    cases=CASES,
    inputs=inputs,
    case_of=lambda atlas, uv: {"atlas": tuple(atlas.shape), "points": uv.shape[1]},
    flops=lambda case: 8 * _results(case) + 16 * case["atlas"][0] * case["points"],
    bytes=_bytes,
    gradients=(0, 1),
)
