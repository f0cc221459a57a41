"""Named cases of guided_ddim_step: latents of SD-1.x clips, with and without guidance and mask."""

from __future__ import annotations

import math

import torch

from tvkernels.testing.spec import OpSpec

LEVELS = (0.62, 0.71, 7.5)  # alpha_bar, alpha_bar at the target, guidance


def _case(shape, guided=True, mask=None, step=LEVELS, boolean=False, frames_inside=False):
    return {
        "shape": shape, "guided": guided, "mask": mask, "step": step, "boolean": boolean,
        "frames_inside": frames_inside,
    }  # fmt: skip


CASES = {
    "guided": _case((1, 3, 4, 6, 5)),
    "plain": _case((2, 1, 4, 4, 4), guided=False),
    "frames_as_batch": _case((3, 4, 5, 7)),
    "masked": _case((2, 3, 4, 6, 5), mask=(2, 3, 1, 6, 5)),
    "one_mask": _case((1, 3, 4, 4, 4), guided=False, mask=(4, 4)),
    "bool_mask": _case((2, 3, 4, 4, 5), mask=(2, 3, 1, 4, 5), boolean=True),
    # [B, C, F, h, w] in memory, as video UNets of diffusers hold latents
    "frames_inside": _case((2, 3, 4, 4, 5), mask=(2, 3, 1, 4, 5), frames_inside=True),
    "noisy": _case((1, 2, 4, 4, 4), step=(0.0047, 0.0058, 7.5)),
    "inversion": _case((1, 2, 4, 4, 4), guided=False, step=(0.9991, 0.9843, 1.0)),
    "no_frame": _case((1, 0, 4, 4, 4)),
    "no_batch": _case((0, 3, 4, 4, 4), mask=(1, 1, 1, 4, 4)),
    "sd15-512": _case((1, 16, 4, 64, 64)),
    "sd15-512-masked": _case((1, 16, 4, 64, 64), mask=(1, 16, 1, 64, 64)),
    "sd15-768x432": _case((1, 16, 4, 54, 96)),
}


def inputs(case, make):
    """Latents, noise, the step and, where the case has one, mask and background."""
    shape, mask = case["shape"], case["mask"]
    sample = make(*shape)
    if case["frames_inside"]:
        sample = sample.transpose(1, 2).contiguous().transpose(1, 2)
    noise = make(shape[0] * (2 if case["guided"] else 1), *shape[1:])
    step = torch.tensor(case["step"], dtype=torch.float32, device=sample.device)
    if mask is None:
        return [sample, noise, step], {}
    mask = make(*mask, positive=True)
    mask = mask > 0.4 if case["boolean"] else mask
    return [sample, noise, step], {"mask": mask, "background": make(*shape)}


def _numbers(case):
    """Elements read and written."""
    size = math.prod(case["shape"])
    read = size * ((3 if case["guided"] else 2) + (case["mask"] is not None))
    return read + math.prod(case["mask"] or (0,))


def _flops(case):
    """Three for the affine update, three for guidance, three for the blend, an element."""
    terms = 3 + 3 * case["guided"] + 3 * (case["mask"] is not None)
    return terms * math.prod(case["shape"])


def _case_of(x, noise, step, mask, background):
    return {
        "shape": tuple(x.shape),
        "guided": noise.shape[0] > x.shape[0],
        "mask": None if mask is None else tuple(mask.shape),
    }


SPEC = OpSpec(
    name="guided_ddim_step",
    cases=CASES,
    inputs=inputs,
    case_of=_case_of,
    flops=_flops,
    bytes=lambda case: 2 * (_numbers(case) + math.prod(case["shape"])),
)
