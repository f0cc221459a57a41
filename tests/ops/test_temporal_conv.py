"""temporal_conv against a loop, and what its index over frames stands for."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tvkernels import temporal_conv
from tvkernels.ops.temporal_conv import cpu
from tvkernels.ops.temporal_conv.spec import SPEC, result_shape
from tvkernels.testing.calls import build

pytestmark = pytest.mark.usefixtures("poisoned")


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("case", SPEC.small_cases)
def test_the_reference_is_a_loop_over_positions_and_frames(case):
    (x, weight, bias), options = build(SPEC, case, torch.float64)
    b, f, c, h, w = x.shape
    length, stride, half = options["frames"], options["stride"], weight.shape[2] // 2
    expected = torch.zeros(result_shape(SPEC.cases[case]), dtype=torch.float64)
    for i, row, column in [(i, y, z) for i in range(b) for y in range(h) for z in range(w)]:
        signal = x[i, :, :, row, column]
        if "norm_weight" in options and f:
            size = c // options["groups"]
            signal = signal.clone()
            for first in range(0, c, size):
                part = signal[:, first : first + size]
                spread = ((part - part.mean()) ** 2).mean()
                signal[:, first : first + size] = (part - part.mean()) / (spread + 1e-5) ** 0.5
            signal = signal * options["norm_weight"] + options["norm_bias"]
            signal = signal / (1 + (-signal).exp())
        for out in range(expected.shape[1]):
            total = torch.zeros(weight.shape[0], dtype=torch.float64)
            for k in range(weight.shape[2]):
                virtual = out * stride + k - half
                if 0 <= virtual < length:
                    total += weight[:, :, k] @ signal[virtual * f // length]
            expected[i, out, :, row, column] = total
    if bias is not None:
        expected += bias[:, None, None]
    if options["residual"] is not None:
        expected += options["residual"]
    assert_close(temporal_conv(x, weight, bias, backend="reference", **options), expected)


@pytest.mark.parametrize(("real", "length"), [(3, 6), (3, 5), (4, 7), (2, 16), (5, 5)])
def test_frames_are_those_of_torchs_nearest_resize(real, length):
    x, weight = randn(2, real, 6, 2, 3), randn(4, 6, 3, seed=1)
    resized = F.interpolate(x.transpose(1, 2), (length, 2, 3), mode="nearest").transpose(1, 2)
    expected = temporal_conv(resized.contiguous(), weight)
    assert_close(temporal_conv(x, weight, frames=length), expected)


def test_positions_do_not_mix_and_statistics_are_their_own():
    x, weight = randn(1, 4, 8, 3, 3), randn(8, 8, 3, seed=1)
    norm = {"norm_weight": randn(8, seed=2), "norm_bias": randn(8, seed=3), "groups": 2}
    before = temporal_conv(x, weight, **norm)
    x[..., 1, 2] = 100 * x[..., 1, 2] + 7
    changed = (temporal_conv(x, weight, **norm) - before).abs().amax((0, 1, 2)) > 0
    assert changed.nonzero().tolist() == [[1, 2]]


BAD = {
    "x is .B, F, C, h, w.": lambda a: a.update(x=a["x"][0]),
    "weight is .O, 8, K. with K odd": lambda a: a.update(weight=a["weight"][:, :, :2]),
    "weight is .O, 8, K. with": lambda a: a.update(weight=a["weight"][:, :7]),
    "bias is .6.": lambda a: a.update(bias=randn(5)),
    "norm_weight is .8.": lambda a: a.update(norm_weight=randn(5)),
    "norm_bias is .8.": lambda a: a.update(norm_bias=randn(5)),
    "norm_weight and norm_bias go together": lambda a: a.update(norm_bias=None),
    "3 groups do not divide 8 channels": lambda a: a.update(groups=3),
    "stride 0 over 4 frames": lambda a: a.update(stride=0),
    "stride 1 over -1 frames": lambda a: a.update(frames=-1),
    "over 2 frames of a clip of 0": lambda a: a.update(x=a["x"][:, :0], frames=2),
    r"residual is the result's \(1, 2, 6, 2, 3\)": lambda a: a.update(stride=2),
    "one floating dtype, got torch.float64, torch.float32": lambda a: a.update(
        bias=randn(6).float()
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_one_line(message):
    arguments = {
        "x": randn(1, 4, 8, 2, 3), "weight": randn(6, 8, 3), "bias": randn(6),
        "norm_weight": randn(8), "norm_bias": randn(8), "groups": 2,
        "residual": randn(1, 4, 6, 2, 3),
    }  # fmt: skip
    temporal_conv(**arguments)
    BAD[message](arguments)
    with pytest.raises(ValueError, match=message):
        temporal_conv(**arguments)


def test_products_of_matrices_have_the_convolutions_gradients():
    """On CUDA, where a convolution's are TF32."""
    outer, x = torch.randn(2, 3, 10, 2, 5).double(), torch.randn(2, 3, 8, 2, 5).double()
    weight = torch.randn(10, 8).double()
    found, expected = (f(outer, x, weight) for f in (cpu._as_matrices, cpu._product_gradients))
    torch.testing.assert_close(found, expected)
