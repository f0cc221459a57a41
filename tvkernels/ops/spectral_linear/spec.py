"""Named cases of spectral_linear: the projections of EI2's temporal module, and odd shapes."""

from __future__ import annotations

import math

from tvkernels.testing.spec import OpSpec


def _case(lead, c_in, c_out, *, bias=True, sigma="given", weight="random"):
    return {
        "lead": lead, "c_in": c_in, "c_out": c_out,
        "bias": bias, "sigma": sigma, "weight": weight,
    }  # fmt: skip


CASES = {
    "small": _case((2, 3, 4), 8, 6),
    "exact": _case((2, 5), 7, 5, sigma="exact"),
    "exact_wide": _case((3, 2), 4, 9, sigma="exact", bias=False),
    "no_bias": _case((1, 3, 5), 8, 8, bias=False),
    "vector": _case((), 5, 3),
    "one_column": _case((4,), 1, 3),
    "zero_weight": _case((2, 3), 8, 8, sigma="zero", weight="zero"),
    "no_token": _case((0, 3), 8, 8),
    "sd15-64": _case((2, 16, 4096), 320, 320),
    "sd15-16": _case((2, 16, 256), 1280, 1280),
}


def inputs(case, make):
    """x, weight, bias and sigma of one case."""
    zero = 0 if case["weight"] == "zero" else 1
    weight = make(case["c_out"], case["c_in"], scale=case["c_in"] ** -0.5, plain=True) * zero
    bias = make(case["c_out"], plain=True) if case["bias"] else None
    sigma = None if case["sigma"] == "exact" else (make(1, positive=True) + 0.5) * zero
    return [make(*case["lead"], case["c_in"]), weight, bias], {"sigma": sigma}


def _tokens(case):
    return math.prod(case["lead"])


SPEC = OpSpec(
    name="spectral_linear",
    cases=CASES,
    inputs=inputs,
    case_of=lambda x, w, *_: {"lead": x.shape[:-1], "c_in": w.shape[1], "c_out": w.shape[0]},
    flops=lambda case: 2 * _tokens(case) * case["c_in"] * case["c_out"],
    bytes=lambda case: (
        2 * (_tokens(case) * (case["c_in"] + case["c_out"]) + (case["c_in"] + 1) * case["c_out"])
    ),
    gradients=(0, 1, 2, "sigma"),
)
