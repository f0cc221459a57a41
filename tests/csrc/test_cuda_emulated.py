"""CUDA kernels on the host: their sources run under tests/csrc/cuda_emulation, on tiny shapes.

What is not executed here: the tensor cores' own rounding, approximations of exp and division,
races within a warp, and everything about speed. `make gpu` is for those.
"""

import math
import os
import subprocess
import sys
from random import Random

import cuda_emulation
import pytest
import torch

from tvkernels import _device, _native
from tvkernels._dispatch import OPS
from tvkernels.ops import specs
from tvkernels.testing.budget import assert_error_budget
from tvkernels.testing.calls import build, registered_arguments
from tvkernels.testing.spec import Maker

pytestmark = [
    pytest.mark.skipif(bool(cuda_emulation.missing()), reason=cuda_emulation.missing() or "-"),
    pytest.mark.usefixtures("poisoned", "emulated"),
]

SPECS = {name: spec for name, spec in specs().items() if "cuda" in OPS[name].backends}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)
STAM = "shift_restricted_temporal_attention"
CALLS = [
    (op, case, dtype)
    for op, spec in SPECS.items()
    for case in spec.small_cases
    for dtype in DTYPES
]
BEYOND = {("temporal_attention", "many_frames"), (STAM, "five_frames"), (STAM, "wide")}
LEFT_OUT = [
    call for call in CALLS if call[:2] in BEYOND or (call[0] == STAM and call[2] == torch.float32)
]
ROOMS = (99, 163, 227)  # KiB of shared memory that devices lend a block


@pytest.fixture
def emulated(monkeypatch):
    """`cuda` backends run the emulated library."""
    library = os.environ.get("TVK_EMULATED_LIBRARY") or cuda_emulation.library()
    torch.ops.load_library(str(library))
    monkeypatch.setattr(_native, "load", lambda part: torch.ops.tvkernels_emulated)


def wide(x):
    floating = isinstance(x, torch.Tensor) and x.is_floating_point()
    return x.double() if floating else x


def check(op, args):
    actual = OPS[op].backend("cuda").forward(*args)
    reference = OPS[op].backend("reference").forward
    assert_error_budget(actual, reference(*args), reference(*map(wide, args)))
    return actual


@pytest.mark.parametrize("make", ({}, {"layout": "permuted"}, {"extreme": "equal"},
                                  {"extreme": "huge"}), ids=str)  # fmt: skip
@pytest.mark.parametrize(("op", "case", "dtype"), [x for x in CALLS if x not in LEFT_OUT], ids=str)
def test_result_within_error_budget(op, case, dtype, make):
    check(op, registered_arguments(SPECS[op], build(SPECS[op], case, dtype, **make)))


def test_exactly_what_is_left_out_is_refused(monkeypatch):
    monkeypatch.setattr(_device, "refuse", lambda op, *tensors: [])
    for op, case, dtype in CALLS:
        args = registered_arguments(SPECS[op], build(SPECS[op], case, dtype))
        refused = bool(OPS[op].backend("cuda").why_not(*args))
        assert refused == ((op, case, dtype) in LEFT_OUT), (op, case, dtype)


# Head dims of SD-1.x with their own kernels, and others; rows of 16 frames and of 32.
SIZES = [
    (d, f)
    for d, frames in (
        (40, (3, 16, 17, 32)), (80, (8, 24)), (160, (16, 25)), (64, (9,)), (24, (31,)), (159, (5,))
    )
    for f in frames
]  # fmt: skip


def shifted(make, *shape):
    """Dense, but for one element before it: no run of 16 bytes is aligned."""
    return make(math.prod(shape) + 1)[1:].view(shape)


def attention(make, f, d, layout):
    if layout == "fused":  # slices of one projection
        q, k, v = make(1, f, 2, 3, 3, d).unbind(3)
    elif layout == "shifted":
        q, k, v = (shifted(make, 2, f, 1, 2, d) for _ in "qkv")
    elif layout == "cut":
        q, k, v = (make(2, f, 1, 2, d + 1)[..., :d] for _ in "qkv")
    else:
        q, k, v = (make(1, d, 3, 2, f).transpose(1, 4) for _ in "qkv")
    return [q, k, v, 0.3 if f == 3 else None]


@pytest.mark.parametrize("layout", ("fused", "shifted", "cut", "transposed"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "f"), SIZES)
def test_temporal_attention(d, f, dtype, layout):
    check("temporal_attention", attention(Maker(d + f, dtype), f, d, layout))


def stam(make, f, c, heads, layout="dense", b=2, n=3, bias=True, sigma=0.7):
    w = [make(c, c, scale=c**-0.5) for _ in range(4)]
    given = make(2 * c, scale=0.1)[::2] if bias else None
    if layout == "turned":  # no run of 16 bytes anywhere
        z, w = make(c, n, f, b).permute(3, 2, 1, 0), [x.T.contiguous().T for x in w]
    elif layout == "shifted":
        z, w = shifted(make, b, f, n, c), [shifted(make, c, c) * c**-0.5 for _ in w]
    elif layout == "cut":  # frames first; weights as parts of one
        z = make(f, b, n, c + 8)[..., :c].transpose(0, 1)
        w = list((make(4, c, c + 8, scale=c**-0.5)[..., :c]).unbind())
    elif layout == "halved":  # every other channel, at addresses that look like runs
        z = make(b, f, n, 2 * c)[..., ::2]
    else:
        z = make(b, f, n, c)
    sigmas = torch.tensor(1.3, dtype=torch.float64), torch.tensor([sigma], dtype=z.dtype)
    return [z, *w, given, *sigmas, heads]


FRAMES = (1, 3, 8, 16, 17, 32)
STAMS = [
    # Two blocks in the first; heads of 2, 5, 20 and 24 channels, an odd number of heads.
    *(dict(f=f, c=16, heads=8, n=11) for f in FRAMES),
    *(dict(f=f, c=40, heads=8) for f in FRAMES),
    dict(f=3, c=40, heads=2, layout="cut"), dict(f=9, c=40, heads=2, layout="shifted"),
    dict(f=16, c=72, heads=3, layout="turned"), dict(f=19, c=72, heads=3, layout="cut"),
    dict(f=5, c=16, heads=2, layout="halved"), dict(f=7, c=72, heads=3, bias=False),
    dict(f=2, c=200, heads=5, layout="shifted"),
]  # fmt: skip


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("given", STAMS, ids=str)
def test_temporal_block(given, dtype, room, monkeypatch):
    monkeypatch.setenv("TVK_EMULATION_SHARED", str(room << 10))
    check(STAM, stam(Maker(given["f"], dtype), **given))


# Every number of frames and every room in turns; the slow suite takes each with each.
@pytest.mark.parametrize(
    ("room", "f"),
    [
        pytest.param(room, f, marks=() if i % len(ROOMS) == j else pytest.mark.slow)
        for j, room in enumerate(ROOMS)
        for i, f in enumerate(FRAMES)
    ],
)
def test_temporal_block_at_full_width(room, f, monkeypatch):
    """Every stage of weights is used anew, and the last columns are there."""
    monkeypatch.setenv("TVK_EMULATION_SHARED", str(room << 10))
    dtype = HALVES[(f + room) % 2]
    check(STAM, stam(Maker(f, dtype), f, 320, 8, b=1, layout=("dense", "cut")[f % 2]))


@pytest.mark.parametrize("zero", ("sigma_v", "sigma_out"))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_temporal_block_with_a_sigma_of_zero(dtype, zero):
    args = stam(Maker(1, dtype), 5, 40, 2)
    args[6 if zero == "sigma_v" else 7] = torch.zeros(1)
    expected = (args[0].float() + args[5].float()).to(dtype)
    assert torch.equal(OPS[STAM].backend("cuda").forward(*args), expected)


def clip(make, b, f, c, h, w, groups, layout="dense", silu=True, offset=0.0):
    if layout == "channels_last":
        x = make(b, f, h, w, c).permute(0, 1, 4, 2, 3)
    elif layout == "turned":
        x = make(b, f, c, w, h).transpose(3, 4)
    elif layout == "cut":
        x = make(b, f, c, h, w + 8)[..., :w]
    elif layout == "gaps":
        x = make(b, f, c, h * w + 1)[..., :-1].unflatten(3, (h, w))
    elif layout == "shifted":
        x = shifted(make, b, f, c, h, w)
    else:
        x = make(b, f, c, h, w)
    return [x + offset, make(2 * c)[::2], make(c), groups, 1e-5, silu]


CLIPS = {
    "several_parts": dict(b=1, f=3, c=8, h=40, w=40, groups=2),
    "several_parts_in_turn": dict(b=1, f=2, c=4, h=29, w=31, groups=2),
    "turned": dict(b=2, f=2, c=6, h=8, w=4, groups=3, layout="turned"),
    "cut": dict(b=1, f=2, c=6, h=4, w=8, groups=3, layout="cut"),
    "gaps": dict(b=1, f=2, c=6, h=4, w=8, groups=3, layout="gaps"),
    "shifted": dict(b=1, f=2, c=6, h=4, w=8, groups=3, layout="shifted"),
    # Runs of 8 channels across groups of 18; tiles of 64 channels and positions with a rest.
    "channels_last": dict(b=2, f=3, c=72, h=8, w=9, groups=4, layout="channels_last"),
    "channels_last_odd": dict(b=1, f=2, c=66, h=5, w=7, groups=3, layout="channels_last"),
    "channels_last_slabs": dict(b=1, f=1, c=2056, h=2, w=2, groups=8, layout="channels_last"),
    "channels_last_rows": dict(b=1, f=2, c=8, h=48, w=48, groups=2, layout="channels_last"),
    "offset": dict(b=1, f=2, c=8, h=16, w=16, groups=2, offset=30.0),
    "channels_last_offset": dict(b=1, f=2, c=8, h=16, w=16, groups=2, offset=30.0,
                                 layout="channels_last"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CLIPS)
def test_clip_group_norm(case, dtype):
    check("clip_group_norm", clip(Maker(len(case), dtype), **CLIPS[case]))


def step(make, other, mask=None, step_dtype=torch.float32, odd=False):
    """Latents whose rows are runs of 16 bytes, or begin anywhere; noise of another dtype."""
    shape = (2, 3, 4, 8, 8)
    noise = other(4, 3, 4, 8, 9)[..., :8] if odd else other(4, 3, 4, 8, 8)
    numbers = torch.tensor((0.62, 0.0, 0.71, 0.0, 7.5, 0.0), dtype=step_dtype)[::2]
    if mask is None:
        return [make(*shape), noise, numbers, None, None]
    m = other(*mask, positive=True)
    background = shifted(make, *shape) if odd else make(*shape)
    return [make(*shape), noise, numbers, m if odd else m > 0.4, background]


@pytest.mark.parametrize("odd", (False, True))
@pytest.mark.parametrize("mask", (None, (2, 3, 1, 8, 8), (8,), (8, 1), (1,)))
@pytest.mark.parametrize("other", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_guided_ddim_step(dtype, other, mask, odd):
    kind = torch.float64 if odd else torch.float32
    check("guided_ddim_step", step(Maker(1, dtype), Maker(2, other), mask, kind, odd))


def anyhow(make, random, *shape):
    """A tensor whose memory is in any order, starts anywhere and has gaps, more or less."""
    order = random.sample(range(len(shape)), len(shape))
    if random.random() < 0.3:
        order.sort()
    gaps = [random.choice((0, 0, 0, 1, 8)) for _ in shape]
    starts = [random.choice((0, gap)) for gap in gaps]
    x = make(*(shape[d] + gaps[d] for d in order)).permute(
        *(order.index(d) for d in range(len(shape)))
    )
    for d, size in enumerate(shape):
        x = x.narrow(d, starts[d], size)
    return x


@pytest.mark.parametrize("seed", range(24))
def test_any_shape_and_strides(seed):
    random = Random(seed)
    pick = random.choice
    make, other = Maker(seed, pick(DTYPES)), Maker(seed + 1, pick(DTYPES))
    d, f = pick((3, 8, 32, 40, 80, 160)), random.randint(1, 32)
    shape = (pick((1, 2)), f, random.randint(1, 3), pick((1, 2, 3)), d)
    check(
        "temporal_attention", [*(anyhow(make, random, *shape) for _ in "qkv"), pick((None, -0.5))]
    )
    groups, size = pick((1, 2, 3)), pick((1, 4, 8, 20))
    c = groups * size
    shape = (
        pick((1, 2)),
        pick((1, 3)),
        c,
        random.randint(2, 16),
        pick((1, 8, random.randint(2, 90))),
    )
    x, parameters = anyhow(make, random, *shape), [make(2 * c)[::2], make(c)]
    check("clip_group_norm", [x, *parameters, groups, 1e-5, pick((False, True))])
    shape = [random.randint(1, 3) for _ in range(random.randint(0, 4))] + [pick((1, 5, 8, 16))]
    mask = [pick((1, n)) for n in shape][random.randint(0, len(shape)) :]
    noise = anyhow(other, random, pick((1, 2)) * shape[0], *shape[1:])
    step = torch.tensor((0.62, 0.71, 7.5))
    blend = [anyhow(other, random, *mask) if mask else other(), anyhow(make, random, *shape)]
    sample = anyhow(make, random, *shape)
    check("guided_ddim_step", [sample, noise, step, *pick((blend, (None, None)))])
    heads, d = random.randint(1, 8), 8 * random.randint(1, 3)
    f, n, make = random.randint(1, 32), random.randint(1, 9), Maker(seed, pick(HALVES))
    args = stam(make, f, heads * d, heads, bias=pick((False, True)))
    args[0] = anyhow(make, random, pick((1, 2)), f, n, heads * d)
    args[1] = anyhow(make, random, heads * d, heads * d) * (heads * d) ** -0.5
    check(STAM, args)


def every_own_case(dtype):
    yield from (
        ("temporal_attention", attention(Maker(1, dtype), f, d, "fused")) for d, f in SIZES
    )
    yield from (("clip_group_norm", clip(Maker(1, dtype), **given)) for given in CLIPS.values())
    yield "guided_ddim_step", step(Maker(1, dtype), Maker(2, dtype), (2, 3, 1, 8, 8))
    if dtype != torch.float32:
        yield from ((STAM, stam(Maker(1, dtype), **given)) for given in STAMS if given["c"] > 40)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_no_result_depends_on_the_order_of_threads(dtype, monkeypatch):
    """A missing barrier shows in one of two orders: memory that is read too early is NaN.

    So does a missing wait: in one of them a copy to shared memory lands at once, in the other when
    it is waited for.
    """
    for at, (op, args) in enumerate(every_own_case(dtype)):
        monkeypatch.setenv("TVK_EMULATION_SHARED", str(ROOMS[at % 3] << 10))
        forward = OPS[op].backend("cuda").forward
        monkeypatch.setenv("TVK_EMULATION_BACKWARD", "0")
        expected = forward(*args)
        monkeypatch.setenv("TVK_EMULATION_BACKWARD", "1")
        assert torch.equal(forward(*args), expected), op


def test_same_bits_twice():
    for op, args in every_own_case(torch.bfloat16):
        forward = OPS[op].backend("cuda").forward
        assert torch.equal(forward(*args), forward(*args)), op


def test_wrong_calls_are_one_clear_error():
    ops = torch.ops.tvkernels_emulated
    x = torch.randn(1, 33, 2, 1, 8)
    with pytest.raises(RuntimeError, match="more than 32 frames"):
        ops.temporal_attention(x, x, x, 1.0)
    with pytest.raises(RuntimeError, match="k has another dtype"):
        ops.temporal_attention(x, x.half(), x, 1.0)
    with pytest.raises(RuntimeError, match="float16, bfloat16 or float32 is needed"):
        ops.temporal_attention(*[x[:, :4].double()] * 3, 1.0)
    with pytest.raises(RuntimeError, match="q, k and v share one shape"):
        ops.temporal_attention(x[:, :4], x[:, :5], x[:, :4], 1.0)
    z, w, one = torch.zeros(1, 4, 2, 48).half(), torch.zeros(48, 48).half(), torch.ones(1)
    block = ops.shift_restricted_temporal_attention
    with pytest.raises(RuntimeError, match="a head dim above 40"):
        block(z, w, w, w, w, None, one, one, 1)
    with pytest.raises(RuntimeError, match="more than 8 heads"):
        block(z, w, w, w, w, None, one, one, 12)
    with pytest.raises(RuntimeError, match="rows of a weight do not begin on 16 bytes"):
        block(z, w, w.T, w, w, None, one, one, 2)
    with pytest.raises(RuntimeError, match="channels that are no multiple of 8"):
        block(z[..., :12], *[w[:12, :12]] * 4, None, one, one, 2)
    with pytest.raises(RuntimeError, match="float16 or bfloat16 is needed"):
        block(z.float(), *[w.float()] * 4, None, one, one, 2)
    with pytest.raises(RuntimeError, match="more than 32 frames"):
        block(z[:, :1].expand(1, 33, 2, 48), w, w, w, w, None, one, one, 2)
    with pytest.raises(RuntimeError, match="a sigma is one float32 number"):
        block(z, w, w, w, w, None, one.half(), one, 2)
    with pytest.raises(RuntimeError, match="groups do not divide the channels"):
        ops.clip_group_norm(x, torch.ones(2), torch.ones(2), 4, 1e-5, False)
    with pytest.raises(RuntimeError, match="mask does not fit sample"):
        ops.guided_ddim_step(x, x, torch.ones(3), torch.ones(3), x)


@pytest.mark.slow
def test_addresses_and_undefined_behaviour():
    """Most of the above once more, built with g++'s sanitizers."""
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    preload = [
        subprocess.run(["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True)
        for name in ("asan", "ubsan")
    ]
    env = {
        **os.environ,
        "TVK_EMULATED_LIBRARY": str(cuda_emulation.library(*flags)),
        "LD_PRELOAD": " ".join(found.stdout.strip() for found in preload),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "OMP_NUM_THREADS": "1",
    }
    chosen = "not test_addresses and not extreme and not order"
    # -s, so that a sanitizer's words reach us: it ends the process.
    command = ["pytest", "-q", "-x", "-s", "-p", "no:xdist", "-k", chosen, __file__]
    result = subprocess.run(
        [sys.executable, "-m", *command], env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " passed" in result.stdout
