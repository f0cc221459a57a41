"""Named cases of atlas_composite: clips of two to four layers, and odd shapes."""

from __future__ import annotations

import math

from tvkernels.testing.spec import OpSpec

CASES = {
    "two": {"layers": (2, 2, 33, 3)},
    "four": {"layers": (1, 4, 20, 3)},
    "background_alone": {"layers": (1, 1, 9, 3)},
    "features": {"layers": (1, 3, 7, 21)},
    "no_point": {"layers": (2, 2, 0, 3)},
    "no_channel": {"layers": (1, 2, 5, 0)},
    "no_batch": {"layers": (0, 2, 5, 3)},
    "sd15-768x432": {"layers": (1, 2, 16 * 432 * 768, 3)},
    "sd15-512-three": {"layers": (1, 3, 16 * 512 * 512, 3)},
}


def inputs(case, make):
    """Layers and opacities."""
    b, count, p, _ = case["layers"]
    return [make(*case["layers"]), make(b, count - 1, p, positive=True)], {}


def _bytes(case):
    b, count, p, c = case["layers"]
    return 2 * (math.prod(case["layers"]) + b * p * (count - 1 + c))


SPEC = OpSpec(
    name="atlas_composite",
    cases=CASES,
    inputs=inputs,
    case_of=lambda layers, alpha: {"layers": tuple(layers.shape)},
    flops=lambda case: 3 * math.prod(case["layers"]),
    bytes=_bytes,
    gradients=(0, 1),
)
