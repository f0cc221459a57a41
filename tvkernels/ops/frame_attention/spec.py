"""Named cases of frame_attention: shapes of SD-1.x, odd ones, and every kind of pattern."""

from __future__ import annotations

import torch

from tvkernels.patterns import FramePattern
from tvkernels.testing.spec import OpSpec, sizes

PATTERNS = {
    "own": FramePattern.own(),
    "first": FramePattern.first(),
    "first_previous": FramePattern.first_previous(),
    "previous_own": FramePattern.previous_own(),
    "all": FramePattern.all(),
    "fine_coarse2": FramePattern.fine_coarse(2),
    "fine_coarse4": FramePattern.fine_coarse(4),
    "fine_coarse2_sized": FramePattern.fine_coarse(2, size_bias=True),
    "uneven": FramePattern.frames(anchors=("mid", 0, 0), offsets=(-1,)),
    "two_levels": FramePattern.rows([[0, (1, 2)], [1, (0, 4), (2, 2)], [2, 2, (1, 4)]]),
}


def _case(pattern, f, grid, h, d, b=1, lse=False, queries=None):
    """`queries` are those of f cached frames that ask; all of them if None."""
    case = {"pattern": pattern, "b": b, "f": f, "grid": grid, "h": h, "d": d, "lse": lse}
    return case | {"queries": queries}


CASES = {
    "own": _case("own", 3, (4, 4), 2, 8),
    "first": _case("first", 3, (4, 4), 2, 8, b=2),
    "first_previous": _case("first_previous", 4, (4, 6), 2, 16),
    "previous_own": _case("previous_own", 3, (5, 3), 2, 8),
    "all": _case("all", 3, (4, 4), 1, 8),
    "fine_coarse2": _case("fine_coarse2", 4, (4, 6), 2, 8, b=2),
    "ragged": _case("fine_coarse4", 3, (5, 7), 2, 8),
    "sized_ragged": _case("fine_coarse2_sized", 3, (5, 7), 2, 8),
    "uneven": _case("uneven", 5, (3, 3), 2, 8),
    "two_levels": _case("two_levels", 3, (6, 5), 2, 8),
    "one_frame": _case("fine_coarse2", 1, (4, 4), 2, 8),
    "no_frame": _case("own", 0, (4, 4), 2, 8),
    "no_batch": _case("own", 2, (4, 4), 2, 8, b=0),
    "lse": _case("fine_coarse2_sized", 3, (4, 5), 2, 8, b=2, lse=True),
    "lse_own": _case("own", 3, (4, 4), 2, 8, lse=True),
    "lse_no_batch": _case("own", 2, (4, 4), 2, 8, b=0, lse=True),
    "d40": _case("first_previous", 2, (4, 4), 2, 40),
    "whole": _case("fine_coarse2_sized", 2, (8, 8), 1, 8),
    "whole_ragged": _case("fine_coarse2_sized", 2, (7, 16), 1, 8),
    "d20": _case("fine_coarse2", 2, (6, 4), 1, 20),
    "d33_lse": _case("fine_coarse2_sized", 2, (3, 5), 1, 33, lse=True),
    "cached": _case("first_previous", 5, (3, 6), 2, 8, b=2, queries=(3, 4)),
    "cached_coarse": _case("fine_coarse2", 4, (2, 9), 1, 24, queries=(2,), lse=True),
    **{
        f"sd15-{name}-{side}": _case(name, 8, (side, side), 8, d, b=2)
        for name in ("own", "first_previous", "fine_coarse2")
        for side, d in ((64, 40), (32, 80), (16, 160), (8, 160))
    },
    "sd15-lse-64": _case("own", 8, (64, 64), 8, 40, b=2, lse=True),
    "sd15-sized-64": _case("fine_coarse2_sized", 8, (64, 64), 8, 40, b=2),
    "sd15-guidance-64": _case("fine_coarse2", 24, (64, 64), 8, 40, b=2),
    # 768 x 432: grids and token counts that no tile divides.
    "sd15-wide-54": _case("fine_coarse4", 8, (54, 96), 8, 40, b=2),
    "sd15-wide-14": _case("fine_coarse4", 8, (14, 24), 8, 160, b=2),
    "sd21-own-64": _case("own", 8, (64, 64), 5, 64, b=2),
    "sd21-fine_coarse2-64": _case("fine_coarse2", 8, (64, 64), 5, 64, b=2),
    "sd-d32": _case("own", 8, (32, 32), 8, 32),
    "sd-d96": _case("own", 8, (32, 32), 8, 96),
    "sd-d128": _case("own", 8, (32, 32), 8, 128),
}


def inputs(case, make):
    """q, k, v, the pattern and the options of one case."""
    h, w = case["grid"]
    frames = case["f"] if case["queries"] is None else len(case["queries"])
    q, k, v = (make(case["b"], f, h * w, case["h"], case["d"]) for f in (frames, *[case["f"]] * 2))
    pattern = PATTERNS[case["pattern"]]
    if case["queries"] is not None:
        pattern = pattern.table(case["f"], queries=case["queries"])
    return [q, k, v, pattern], {"grid": case["grid"], "return_lse": case["lse"]}


def _pairs(case):
    """Scores computed: query tokens times the tokens they read."""
    h, w = case["grid"]
    tokens = {0: h * w}
    total = 0
    for row in PATTERNS[case["pattern"]].segments(case["f"], case["queries"]):
        for s in row:
            tokens.setdefault(s.level, -(-h // max(s.level, 1)) * -(-w // max(s.level, 1)))
            total += tokens[s.level]
    return case["b"] * case["h"] * h * w * total


def _case_of(q, k, v, row_ptr, segments, levels, h, w, scale, lse):
    frames, grid = k.shape[1], (h, w) if h else (q.shape[2], 1)
    if q.shape[1] != frames:
        return None  # which of the cached frames ask is in no tensor's shape
    case = sizes("bfnhd", q) | {"grid": grid, "lse": lse, "queries": None}
    for name, pattern in PATTERNS.items():
        try:
            table = pattern.table(frames, device=segments.device)
        except ValueError:  # rows for another number of frames
            continue
        if torch.equal(table.row_ptr, row_ptr) and torch.equal(table.segments, segments):
            return case | {"pattern": name}
    return None


SPEC = OpSpec(
    name="frame_attention",
    cases=CASES,
    inputs=inputs,
    case_of=_case_of,
    flops=lambda case: 4 * case["d"] * _pairs(case),
    bytes=lambda case: (
        2 * 4 * case["b"] * case["f"] * case["grid"][0] * case["grid"][1] * case["h"] * case["d"]
    ),
    exps=_pairs,
    gradients=(0, 1, 2),
)
