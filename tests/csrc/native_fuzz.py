"""Calls of the native CPU ops against the reference: random shapes, strides, alignments, dtypes,
and sizes at which a tail begins at every number of every vector of a block.

A program of its own too, so that it can run at another level or beside a sanitizer:
``python tests/csrc/native_fuzz.py FOLDER ROUNDS [OP ...]``, where FOLDER holds the library.
"""

import argparse
import dataclasses
import random
from pathlib import Path

import torch

import tvkernels
from tvkernels import _native
from tvkernels._dispatch import OPS, brings_backward
from tvkernels.ops import specs
from tvkernels.testing.budget import assert_error_budget
from tvkernels.testing.calls import build, gradients, registered_arguments, tensors

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def size(rng, most):
    """A size from 1 on, small ones and those around a vector's width more often."""
    return rng.choice((rng.randint(1, most), rng.choice((1, 2, 3, 4, 7, 8, 9, 15, 16, 17))))


def temporal_attention(rng):
    shape = {"b": rng.randint(1, 2), "f": size(rng, 20), "n": rng.randint(1, 5)}
    return shape | {"h": rng.randint(1, 5), "d": size(rng, 90), "scale": rng.choice((None, 0.3))}


def clip_group_norm(rng):
    groups = rng.randint(1, 4)
    channels = groups * size(rng, 20)
    # One plane in four is longer than the block whose sum is one float32.
    side = 80 if rng.random() < 0.25 and channels < 20 else size(rng, 12)
    shape = (rng.randint(1, 2), rng.randint(1, 4), channels, side, size(rng, 12))
    return {"shape": shape, "groups": groups, "silu": rng.random() < 0.5}


def temporal_conv(rng):
    groups = rng.randint(1, 3)
    side = 11 if rng.random() < 0.3 else size(rng, 8)  # more positions than a block holds
    shape = (rng.randint(1, 2), rng.randint(1, 5), groups * size(rng, 12), side, size(rng, 12))
    return {
        "shape": shape,
        "groups": groups,
        "frames": shape[1],
        "out": size(rng, 12),
        "norm": True,
    }


def guided_ddim_step(rng):
    shape = tuple(size(rng, most) for most in (40, 40, 9, 5, 5)[: rng.randint(1, 5)])
    mask = tuple(n if rng.random() < 0.6 else 1 for n in shape)[rng.randint(0, len(shape) - 1) :]
    return {
        "shape": shape, "guided": rng.random() < 0.5, "mask": rng.choice((None, mask, shape)),
        "step": (rng.uniform(0.01, 0.99), rng.uniform(0.01, 0.99), 7.5),
        "boolean": rng.random() < 0.3, "frames_inside": False,
    }  # fmt: skip


def frame_attention(rng):
    f = rng.randint(1, 5)
    some = tuple(rng.randrange(f) for _ in range(rng.randint(1, 3)))
    pattern = rng.choice(("own", "first", "first_previous", "all", "fine_coarse2", "fine_coarse4",
                          "fine_coarse2_sized", "uneven"))  # fmt: skip
    return {
        "b": rng.randint(1, 2), "f": f, "grid": (size(rng, 20), size(rng, 20)),
        "h": rng.randint(1, 3), "d": size(rng, 90), "pattern": pattern,
        "queries": rng.choice((None, some)), "lse": rng.random() < 0.3,
    }  # fmt: skip


def token_map_attention(rng):
    length = size(rng, 300)
    words = tuple(rng.randrange(length) for _ in range(rng.randint(0, 4)))
    shape = {"b": rng.randint(1, 2), "f": rng.randint(1, 3), "n": size(rng, 300)}
    return shape | {"h": rng.randint(1, 3), "d": size(rng, 90), "length": length, "tokens": words}


def shift_restricted_temporal_attention(rng):
    heads = rng.randint(1, 4)
    shape = {"b": rng.randint(1, 2), "f": size(rng, 20), "n": size(rng, 40), "heads": heads}
    return shape | {"c": heads * size(rng, 40), "bias": rng.random() < 0.7}


SHAPES = {
    draw.__name__: draw
    for draw in (
        temporal_attention, clip_group_norm, guided_ddim_step, frame_attention,
        token_map_attention, shift_restricted_temporal_attention, temporal_conv,
    )
}  # fmt: skip


def around(n):
    return n - 1, n, n + 1


VECTORS = range(1, 34)  # every number of the widest vector, alone and after another one
BLOCK = range(1, 66)  # the same of four such vectors
# The sizes of each op's axes that kernels walk in vectors, tiles or blocks.
EDGES = {
    "temporal_attention": {"f": VECTORS, "d": VECTORS},
    "clip_group_norm": {"plane": (*BLOCK, *around(4096))},
    "temporal_conv": {"plane": (*BLOCK, *range(113, 130))},
    "guided_ddim_step": {"row": (*VECTORS, *around(1024))},
    "frame_attention": {"grid": (*BLOCK, *around(128), *around(256)), "d": VECTORS},
    "token_map_attention": {
        "n": (*BLOCK, *around(256)), "d": VECTORS, "length": (*range(1, 10), *around(128)),
    },
    "shift_restricted_temporal_attention": {"width": VECTORS, "f": VECTORS},
}  # fmt: skip


def rows(n):
    """n positions as height and width, several rows where that can be."""
    height = next(k for k in (3, 2, 1) if n % k == 0)
    return height, n // height


PLACES = {
    "plane": lambda n: {"shape": (1, 3, 8, *rows(n))},
    "row": lambda n: {"shape": (2, n)},
    "grid": lambda n: {"grid": rows(n), "f": 2, "pattern": "fine_coarse2_sized", "lse": True},
    "length": lambda n: {"length": n, "tokens": (n - 1, 0)},
    "width": lambda n: {"c": n, "heads": 1},
}


def edges(op, every=1):
    """(seed, what a call sets of the op's smallest case) for one in `every` edges. One in four
    still has a tail in every vector of four numbers or more.
    """
    named = [(axis, n) for axis, sizes in EDGES.get(op, {}).items() for n in sizes]
    for seed in range(0, len(named), every):
        axis, n = named[seed]
        yield seed, PLACES[axis](n) if axis in PLACES else {axis: n}


def laid_out(x, rng):
    """x, equal in value, at other strides and an odd address, with NaN in all the gaps."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dim() == 0:
        return x
    order = list(range(x.dim()))
    rng.shuffle(order)
    steps = [rng.choice((1, 1, 1, 2)) for _ in order]
    room = [
        x.shape[d] * step + rng.choice((0, 0, 3)) for d, step in zip(order, steps, strict=True)
    ]
    offset = rng.randint(0, 9)
    count = torch.Size(room).numel()
    memory = torch.full((count + offset,), torch.nan, dtype=x.dtype)[offset:].view(room)
    view = memory.permute([order.index(d) for d in range(x.dim())])
    for d in range(x.dim()):
        view = view[(slice(None),) * d + (slice(0, x.shape[d] * steps[order.index(d)]),)]
        view = view[(slice(None),) * d + (slice(None, None, steps[order.index(d)]),)]
    return view.copy_(x)


def check(op, seed, edge=None):
    """One call of one op, of random shapes or at an edge; the message names what must be known to
    repeat it.
    """
    rng = random.Random(f"{op} {seed}")
    spec = specs()[op]
    case = spec.small_cases[0] if edge else rng.choice(spec.small_cases)
    draws = 1 if edge else 4  # calls at edges are many
    if edge is None and op in SHAPES and rng.random() < 0.8:
        edge = SHAPES[op](rng)
    if edge:
        spec = dataclasses.replace(spec, cases={case: {**spec.cases[case], **edge}})
    dtype = DTYPES[seed % len(DTYPES)]
    again = rng.getrandbits(32)

    def given(strides, seed, **make):
        positional, keyword = build(spec, case, dtype, seed=seed, **make)
        every = strides.random() < 0.5
        named = dict(enumerate(positional)) | keyword
        # All of them, or one alone: what the others could merge, it must not.
        odd = named if every else {strides.choice([*named])}
        named = {name: laid_out(x, strides) if name in odd else x for name, x in named.items()}
        return [named.pop(i) for i in range(len(positional))], named

    def results(backend, **make):
        positional, keyword = given(random.Random(again), seed, **make)
        found = tensors(spec.call(*positional, **keyword, backend=backend))
        assert found
        return dict(enumerate(found))

    def grads(backend, **make):
        """Of all draws together, of 128 numbers or more: the rounding error of few, such as
        sigma's one, says little.
        """
        drawn = []
        for i in range(draws):
            strides = random.Random(again)

            def call(*positional, strides=strides, **keyword):
                result = spec.call(*positional, **keyword, backend=backend)
                for x in tensors(result):
                    x.register_hook(lambda grad: laid_out(grad, strides))
                return result

            drawn.append(gradients(spec, given(strides, 1000 * seed + i, **make), call)[1])
        several = [name for name, grad in drawn[0].items() if draws * grad.numel() >= 128]
        return {name: torch.stack([grad[name] for grad in drawn]) for name in several}

    def compare(run, factor, what):
        found, low, exact = run("native"), run("reference"), run("reference", wide=torch.float64)
        assert list(found) == list(exact)
        for name, result in found.items():
            where = f"{op}, seed {seed}, {dtype}, {spec.cases[case]}, {what} {name}"
            assert_error_budget(result, low[name], exact[name], factor=factor, what=where)

    compare(results, spec.budget, "output")
    args = registered_arguments(spec, given(random.Random(again), seed))
    if spec.gradients and brings_backward(OPS[op].backend("native"), args):
        compare(grads, spec.gradient_budget, "gradient of argument")


def check_rounding():
    """Halves are widened exactly and rounded to nearest even: as torch rounds the same float32."""
    step = torch.tensor([0.5, 0.25, 1.0])
    for dtype in DTYPES[1:]:
        # Every bit pattern: subnormals, infinities and NaN among them. The lone last is a tail.
        x = torch.arange(-(2**15), 2**15 + 1).to(torch.int16).view(dtype)
        noise = torch.randn(len(x), generator=torch.Generator().manual_seed(1)).to(dtype) * 0.01
        noise[::2] = 0
        found = tvkernels.guided_ddim_step(x, noise, step, backend="native")
        wide = tvkernels.guided_ddim_step(x.float(), noise.float(), step, backend="native")
        expected = wide.to(dtype)
        assert torch.equal(found.isnan(), expected.isnan()), dtype
        assert torch.equal(found.nan_to_num(), expected.nan_to_num()), dtype


def main(folder, rounds, ops, every):
    _native.FOLDER = folder
    torch.use_deterministic_algorithms(True, warn_only=True)  # results begin as NaN
    level = _native.load("cpu").level()
    check_rounding()
    ops = ops or [op for op in specs() if "native" in OPS[op].backends]
    found = [(op, *edge) for op in ops for edge in edges(op, every)]
    for call in found + [(op, seed) for op in ops for seed in range(rounds)]:
        check(*call)
    print(f"{len(ops)} ops, {rounds} calls each, {len(found)} at edges, level {level}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("rounds", type=int)
    parser.add_argument("ops", nargs="*")
    parser.add_argument("--every", type=int, default=1, help="one in so many calls at edges")
    main(**vars(parser.parse_args()))
