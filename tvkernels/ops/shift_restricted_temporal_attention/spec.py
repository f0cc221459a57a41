"""Named cases of shift_restricted_temporal_attention: shapes of SD-1.x and odd ones."""

from __future__ import annotations

from tvkernels.testing.spec import OpSpec, sizes


def _case(b, f, n, c, heads, *, bias=True, sigma="given", offset=0.0):
    return {
        "b": b, "f": f, "n": n, "c": c, "heads": heads,
        "bias": bias, "sigma": sigma, "offset": offset,
    }  # fmt: skip


CASES = {
    "small": _case(2, 3, 4, 16, 2),
    "one_frame": _case(1, 1, 5, 8, 2),
    "five_frames": _case(1, 5, 3, 12, 3),
    "exact": _case(1, 4, 3, 8, 1, sigma="exact"),
    "no_bias": _case(1, 3, 2, 8, 2, bias=False),
    "offset": _case(1, 8, 4, 16, 2, offset=8.0),  # what centering is for: mean above deviation
    "zero_sigma": _case(1, 3, 4, 8, 2, sigma="zero"),
    "wide": _case(1, 3, 2, 328, 2),  # more channels than a fused kernel takes
    "many_frames": _case(1, 17, 3, 40, 2),
    "no_batch": _case(0, 3, 4, 8, 2),
    "no_frame": _case(1, 0, 4, 8, 2),
    **{
        f"sd15-{side}": _case(2, 16, side * side, c, 8)
        for side, c in ((64, 320), (32, 640), (16, 1280), (8, 1280))
    },
    # To 16 frames one configuration serves, from 17 to 32 another.
    "sd15-64-24f": _case(2, 24, 64 * 64, 320, 8),
}


def inputs(case, make):
    """z, the four weights, bias and sigmas of one case."""
    c = case["c"]
    z = make(case["b"], case["f"], case["n"], c) + case["offset"]
    weights = [make(c, c, scale=c**-0.5, plain=True) for _ in range(4)]
    if case["sigma"] == "zero":
        weights[2:] = [weight * 0 for weight in weights[2:]]
    bias = make(c, scale=0.1, plain=True) if case["bias"] else None
    sigmas = {}
    if case["sigma"] != "exact":
        nonzero = case["sigma"] == "given"
        sigmas = {n: (make(1, positive=True) + 0.5) * nonzero for n in ("sigma_v", "sigma_out")}
    return [z, *weights, bias], {"heads": case["heads"], **sigmas}


def _tokens(case):
    return case["b"] * case["f"] * case["n"]


def _pairs(case):
    """Scores computed: every frame with every frame, for each position and head."""
    return _tokens(case) * case["f"] * case["heads"]


SPEC = OpSpec(
    name="shift_restricted_temporal_attention",
    cases=CASES,
    inputs=inputs,
    case_of=lambda z, *args: sizes("bfnc", z) | {"heads": args[-1]},
    flops=lambda case: (
        4 * 2 * _tokens(case) * case["c"] ** 2 + 4 * case["c"] // case["heads"] * _pairs(case)
    ),
    bytes=lambda case: 2 * (2 * _tokens(case) * case["c"] + 4 * case["c"] ** 2 + case["c"]),
    exps=_pairs,
    gradients=(0, 1, 2, 3, 4, 5, "sigma_v", "sigma_out"),
)
