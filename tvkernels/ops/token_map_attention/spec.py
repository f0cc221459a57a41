"""Named cases of token_map_attention: the cross-attention layers of SD-1.x, and odd shapes."""

from __future__ import annotations

import torch

from tvkernels.testing.spec import OpSpec, sizes


def _case(f, n, h, d, tokens, length=77, b=1):
    return {"b": b, "f": f, "n": n, "h": h, "d": d, "tokens": tokens, "length": length}


CASES = {
    "two_words": _case(3, 24, 2, 8, (1, 4), length=7, b=2),
    "one_frame": _case(1, 15, 2, 16, (0, 6, 6), length=7),
    "one_word": _case(2, 16, 1, 8, (0,), length=2),
    "d40": _case(2, 16, 3, 40, (5,)),
    "many_words": _case(1, 9, 2, 8, tuple(range(35)), length=40),
    "whole_tiles": _case(2, 7, 2, 24, (31, 0), length=32),
    "no_word": _case(2, 9, 2, 8, (), length=5),
    "no_frame": _case(0, 9, 2, 8, (2,), length=5),
    "no_batch": _case(2, 9, 2, 8, (2, 3), length=5, b=0),
    **{
        f"sd15-{side}": _case(16, side * side, 8, d, (2, 5), b=2)
        for side, d in ((64, 40), (32, 80), (16, 160), (8, 160))
    },
}


def inputs(case, make):
    """q, k, v and the chosen positions of one case."""
    q = make(case["b"], case["f"], case["n"], case["h"], case["d"])
    k, v = (make(case["b"], case["length"], case["h"], case["d"]) for _ in range(2))
    return [q, k, v, torch.tensor(case["tokens"], dtype=torch.int64, device=q.device)], {}


def _queries(case):
    return case["b"] * case["f"] * case["n"]


SPEC = OpSpec(
    name="token_map_attention",
    cases=CASES,
    inputs=inputs,
    case_of=lambda q, k, v, tokens, scale: (
        sizes("bfnhd", q) | {"tokens": tokens, "length": k.shape[1]}
    ),
    flops=lambda case: 4 * _queries(case) * case["h"] * case["length"] * case["d"],
    bytes=lambda case: (
        2
        * (
            _queries(case) * (2 * case["h"] * case["d"] + len(case["tokens"]))
            + 2 * case["b"] * case["length"] * case["h"] * case["d"]
        )
    ),
    exps=lambda case: _queries(case) * case["h"] * case["length"],
    gradients=(0, 1, 2),
)
