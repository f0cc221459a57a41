"""The shapes to measure and their inputs, drawn where they are used."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from tvkernels.ops import NAMES, specs
from tvkernels.testing.calls import copied
from tvkernels.testing.spec import Maker, OpSpec

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
STAND_IN = "~cpu"  # ends the name of a real case made small for a CPU
# What changes in a real case so that a CPU is through in milliseconds; ops not named here are
# small enough as they are.
SMALLER = {
    "frame_attention": {"b": 1, "f": 3, "grid": (16, 16)},
    "temporal_attention": {"b": 1, "n": 64},
    "instance_center": {"b": 1, "n": 64},
    "spectral_linear": {"lead": (1, 4, 64)},
    "shift_restricted_temporal_attention": {"b": 1, "f": 8, "n": 16},
    "token_map_attention": {"b": 1, "f": 4, "n": 256},
    "clip_group_norm": {"shape": lambda shape: (1, 4, shape[2], 16, 16)},
    "temporal_conv": {"shape": lambda shape: (1, *shape[1:3], 4, 4)},
    "atlas_sample": {
        "atlas": lambda shape: (shape[0], shape[1] // 8, shape[2] // 8, shape[3]),
        "points": lambda points: points // 64,
    },
    "atlas_splat": {
        "values": lambda shape: (shape[0], shape[1] // 64, shape[2]),
        "size": lambda size: (size[0] // 8, size[1] // 8),
    },
    "atlas_composite": {"layers": lambda shape: (*shape[:2], shape[2] // 64, shape[3])},
}
MOST_SETS = 64


class DeviceMaker(Maker):
    """`Maker` whose numbers are drawn on the device: a host takes seconds for a real case."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device, layout: str = "dense"):
        super().__init__(seed, dtype, device, layout)
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, **options) -> Tensor:
        with torch.device(self.device):
            return super().__call__(*shape, **options)


def line_up(
    ops: Sequence[str] | None, cases: Sequence[str] | None, device: torch.device
) -> list[tuple[OpSpec, str]]:
    """(spec, case) of everything to measure, in the order of `tvkernels.ops.NAMES`.

    Args:
        ops: names, all if None.
        cases: names, taken from every op that has them; if None the real ones, and on a CPU
            smaller stand-ins for them, whose names end in `STAND_IN`.
    Raises:
        ValueError: unknown op, or a case that none of the ops has.
    """
    known = specs()
    for name in ops or ():
        if name not in known:
            raise ValueError(f"unknown op {name!r}: use one of {', '.join(known)}")
    chosen = [known[name] for name in NAMES if ops is None or name in ops]
    if device.type == "cpu":
        chosen = [with_stand_ins(spec) for spec in chosen]
    for case in cases or ():
        if not any(case in spec.cases for spec in chosen):
            names = dict.fromkeys(name for spec in chosen for name in spec.cases)
            raise ValueError(f"unknown case {case!r}: use one of {', '.join(names)}")
    if cases is not None:
        return [(spec, case) for spec in chosen for case in spec.cases if case in cases]
    if device.type == "cpu":
        return [(s, case) for s in chosen for case in s.cases if case.endswith(STAND_IN)]
    return [(spec, case) for spec in chosen for case in spec.real_cases]


def with_stand_ins(spec: OpSpec) -> OpSpec:
    """The spec with smaller cases beside its real ones; those that become equal appear once."""
    found: dict[str, dict] = {}
    for name in spec.real_cases:
        case = dict(spec.cases[name])
        for key, value in SMALLER.get(spec.name, {}).items():
            case[key] = value(case[key]) if callable(value) else value
        if case not in found.values():
            found[name + STAND_IN] = case
    return dataclasses.replace(spec, cases={**spec.cases, **found})


def inputs(
    spec: OpSpec,
    case: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    seed: int = 0,
    layout: str = "dense",
):
    """Fresh (positional, keyword) arguments; the same seed draws the same numbers."""
    seed += 1000 * sum(map(ord, spec.name + case))
    return copied(spec.inputs(spec.cases[case], DeviceMaker(seed, dtype, device, layout)))


def number_of_sets(size: int, device: torch.device) -> int:
    """How many sets of inputs of `size` bytes are together larger than L2; 3 at least."""
    if device.type != "cuda":
        return 3
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(3, 2 * l2 // max(size, 1)), MOST_SETS)
