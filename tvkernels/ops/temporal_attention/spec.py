"""Named cases of temporal_attention: shapes of SD-1.x and odd ones."""

from __future__ import annotations

from tvkernels.testing.spec import OpSpec, sizes


def _case(b, f, n, h, d, scale=None):
    return {"b": b, "f": f, "n": n, "h": h, "d": d, "scale": scale}


CASES = {
    "small": _case(2, 3, 6, 2, 8),
    "one_frame": _case(1, 1, 5, 2, 8),
    "five_frames": _case(1, 5, 7, 3, 5),
    "one_token": _case(2, 4, 1, 1, 16),
    "scaled": _case(1, 3, 4, 2, 8, scale=0.7),
    "seventeen_frames": _case(1, 17, 3, 2, 40),
    "many_frames": _case(1, 35, 3, 2, 24),
    "no_batch": _case(0, 3, 4, 2, 8),
    "no_frame": _case(1, 0, 4, 2, 8),
    **{
        f"sd15-{side}": _case(2, 16, side * side, 8, d)
        for side, d in ((64, 40), (32, 80), (16, 160), (8, 160))
    },
    # AnimateDiff's temporal layers with guidance are the first three. One kernel serves to 16
    # frames, its wider form to 32, another beyond.
    **{
        f"sd15-{side}-{frames}f": _case(2, frames, side * side, 8, d)
        for side, d, frames in ((64, 40, 24), (32, 80, 24), (16, 160, 24), (16, 160, 48))
    },
}


def inputs(case, make):
    """q, k and v of one case."""
    shape = [case[name] for name in "bfnhd"]
    return [make(*shape), make(*shape), make(*shape)], {"scale": case["scale"]}


def _pairs(case):
    """Scores computed: every frame with every frame, for each position and head."""
    return case["b"] * case["n"] * case["h"] * case["f"] ** 2


SPEC = OpSpec(
    name="temporal_attention",
    cases=CASES,
    inputs=inputs,
    case_of=lambda q, *_: sizes("bfnhd", q),
    flops=lambda case: 4 * case["d"] * _pairs(case),
    bytes=lambda case: 2 * 4 * case["b"] * case["f"] * case["n"] * case["h"] * case["d"],
    exps=_pairs,
    gradients=(0, 1, 2),
)
