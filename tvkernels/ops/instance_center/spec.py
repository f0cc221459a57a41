"""Named cases of instance_center: shapes of SD-1.x and odd ones."""

from __future__ import annotations

from tvkernels.testing.spec import OpSpec, sizes


def _case(b, f, n, c):
    return {"b": b, "f": f, "n": n, "c": c}


CASES = {
    "small": _case(2, 3, 6, 8),
    "one_frame": _case(1, 1, 5, 8),
    "five_frames": _case(1, 5, 7, 3),
    "one_channel": _case(2, 4, 9, 1),
    "many_frames": _case(2, 33, 3, 5),
    "no_batch": _case(0, 3, 4, 8),
    "no_frame": _case(1, 0, 4, 8),
    "sd15-64": _case(2, 16, 4096, 320),
    "sd15-16": _case(2, 16, 256, 1280),
    # Of 17 to 32 frames, and more than one program holds.
    "sd15-32-24f": _case(2, 24, 1024, 640),
    "sd15-16-48f": _case(1, 48, 256, 1280),
}


def inputs(case, make):
    """z of one case."""
    return [make(*(case[name] for name in "bfnc"))], {}


def _elements(case):
    return case["b"] * case["f"] * case["n"] * case["c"]


SPEC = OpSpec(
    name="instance_center",
    cases=CASES,
    inputs=inputs,
    case_of=lambda z: sizes("bfnc", z),
    flops=lambda case: 2 * _elements(case),
    bytes=lambda case: 2 * 2 * _elements(case),
    gradients=(0,),
)
