"""Named cases of latent_blend: latents of SD-1.x clips and every way a mask broadcasts."""

from __future__ import annotations

import math

from tvkernels.testing.spec import OpSpec

CASES = {
    "per_frame": {"shape": (2, 3, 4, 6, 5), "mask": (2, 3, 1, 6, 5)},
    "one_mask": {"shape": (1, 3, 4, 5, 7), "mask": (5, 7)},
    "full_mask": {"shape": (3, 4, 5, 7), "mask": (3, 4, 5, 7)},
    "one_frame": {"shape": (1, 1, 4, 4, 4), "mask": (1, 1, 1, 4, 4)},
    "bool_mask": {"shape": (2, 3, 4, 4, 5), "mask": (3, 1, 4, 5), "boolean": True},
    "no_frame": {"shape": (1, 0, 4, 4, 4), "mask": (1, 0, 1, 4, 4)},
    "no_batch": {"shape": (0, 3, 4, 4, 4), "mask": (1,)},
    "sd15-512": {"shape": (1, 16, 4, 64, 64), "mask": (1, 16, 1, 64, 64)},
    "sd15-768x432": {"shape": (1, 16, 4, 54, 96), "mask": (1, 16, 1, 54, 96)},
}


def inputs(case, make):
    """Foreground, background and mask."""
    mask = make(*case["mask"], positive=True)
    mask = mask > 0.4 if case.get("boolean") else mask
    return [make(*case["shape"]), make(*case["shape"]), mask], {}


SPEC = OpSpec(
    name="latent_blend",
    cases=CASES,
    inputs=inputs,
    case_of=lambda x, background, mask: {"shape": x.shape, "mask": mask.shape},
    flops=lambda case: 3 * math.prod(case["shape"]),
    bytes=lambda case: 2 * (3 * math.prod(case["shape"]) + math.prod(case["mask"])),
)
