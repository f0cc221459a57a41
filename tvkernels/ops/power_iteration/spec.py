"""Named cases of power_iteration: the projections that EI2 normalises, and odd shapes."""

from __future__ import annotations

from tvkernels.testing.spec import OpSpec


def _case(c_out, c_in, steps=1, *, weight="random", u="random"):
    return {"c_out": c_out, "c_in": c_in, "steps": steps, "weight": weight, "u": u}


CASES = {
    "small": _case(6, 8, steps=2),
    "one_step": _case(7, 5),
    "one_column": _case(3, 1, steps=2),
    "one_row": _case(1, 9),
    "several_tiles": _case(37, 45, steps=3),
    "wide": _case(5, 70, steps=2),
    "tall": _case(70, 5, steps=2),
    "zero_weight": _case(4, 3, steps=2, weight="zero"),
    "many_zeros": _case(33, 40, steps=2, weight="zero"),
    "zero_start": _case(4, 6, u="zero"),
    "late_start": _case(34, 41, steps=2, u="zero"),
    "no_input": _case(3, 0),
    "no_output": _case(0, 3),
    "sd15-320": _case(320, 320),
    "sd15-1280": _case(1280, 1280),
    # What a new layer runs before its first step; its later steps are other kernels.
    "sd15-640-new": _case(640, 640, steps=15),
}


def inputs(case, make):
    """weight, u and steps of one case."""
    weight = make(case["c_out"], case["c_in"], scale=max(case["c_in"], 1) ** -0.5)
    u = make(case["c_out"], plain=True)
    weight, u = weight * (case["weight"] != "zero"), u * (case["u"] != "zero")
    return [weight, u, case["steps"]], {}


def _elements(case):
    return case["c_out"] * case["c_in"]


SPEC = OpSpec(
    name="power_iteration",
    cases=CASES,
    inputs=inputs,
    case_of=lambda w, u, steps: {"c_in": w.shape[1], "c_out": w.shape[0], "steps": steps},
    flops=lambda case: 4 * case["steps"] * _elements(case),
    # The weight once, however many steps: a cache holds it.
    bytes=lambda case: 2 * _elements(case) + 6 * case["c_out"] + 4 * case["c_in"],
)
