"""Named cases of atlas_splat: a clip's frames into its atlas, and odd shapes."""

from __future__ import annotations

from tvkernels.testing.spec import OpSpec


def _case(b, p, c, h, w, weighted=True):
    return {"values": (b, p, c), "size": (h, w), "weighted": weighted}


CASES = {
    "weighted": _case(2, 60, 3, 4, 5),
    "plain": _case(1, 45, 3, 3, 4, weighted=False),
    "sparse": _case(1, 7, 2, 9, 9),  # texels that nothing reaches
    "one_texel": _case(1, 19, 4, 1, 1),
    "features": _case(1, 25, 9, 3, 2),
    "no_point": _case(2, 0, 3, 3, 3),
    "no_batch": _case(0, 5, 3, 3, 3, weighted=False),
    "sd15-768x432": _case(1, 16 * 432 * 768, 3, 2000, 2000),  # the paper's frames and atlas
    "sd15-512": _case(1, 16 * 512 * 512, 3, 1024, 1024, weighted=False),
}


def inputs(case, make):
    """Values, UV of which a fifth lie outside, and weights."""
    b, p, c = case["values"]
    uv = 2.5 * make(b, p, 2, positive=True) - 1.25
    weight = make(b, p, positive=True) if case["weighted"] else None
    return [make(b, p, c), uv, case["size"]], {"weight": weight}


def _points(case):
    return case["values"][0] * case["values"][1]


def _bytes(case):
    (b, _, c), (h, w) = case["values"], case["size"]
    return 2 * (_points(case) * (c + 2 + case["weighted"]) + b * h * w * (c + 1))


SPEC = OpSpec(
    name="atlas_splat",
    cases=CASES,
    inputs=inputs,
    case_of=lambda values, uv, weight, *size: {
        "values": tuple(values.shape),
        "size": size,
        "weighted": weight is not None,
    },
    flops=lambda case: _points(case) * (16 + 8 * (case["values"][2] + 1)),
    bytes=_bytes,
    gradients=(0,),
)
