"""Elementwise kernels over tensors of one shape and any strides: fewest dimensions, places."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

DIMENSIONS = 5  # video latents have no more
LARGEST = 2**31 - 2048  # elements that an int32 counts, those of the last block included


def why_not(shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> list[str]:
    """Reasons against walking these tensors, all expanded to `shape`, in one kernel."""
    sizes, _ = merge(shape, tensors)
    reasons = []
    if len(sizes) > DIMENSIONS:
        reasons.append(f"strides leave {len(sizes)} dimensions, the kernel walks {DIMENSIONS}")
    if tensors and next(iter(tensors.values())).numel() > LARGEST:
        reasons.append(f"more than {LARGEST} elements")
    return reasons


def merge(shape, tensors: Mapping[str, Tensor]) -> tuple[list[int], dict[str, list[int]]]:
    """The fewest sizes, and each tensor's strides, that visit all elements in shape's order."""
    sizes, strides = [], {name: [] for name in tensors}
    for i, size in enumerate(shape):
        if size == 1:
            continue
        if sizes and all(s[-1] == size * tensors[n].stride(i) for n, s in strides.items()):
            sizes[-1] *= size
            for name, s in strides.items():
                s[-1] = tensors[name].stride(i)
        else:
            sizes.append(size)
            for name, s in strides.items():
                s.append(tensors[name].stride(i))
    return sizes, strides


def numbers(shape, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Run-time arguments of `place`: n1.. behind the first size, and x_0.. for every tensor x."""
    sizes, strides = merge(shape, tensors)
    found = {f"n{i}": size for i, size in enumerate(_filled(sizes, 1)) if i}
    return found | {
        f"{name}_{i}": stride
        for name, s in strides.items()
        for i, stride in enumerate(_filled(s, 0))
    }


def _filled(values: list[int], by: int) -> list[int]:
    return values + [by] * (DIMENSIONS - len(values))


@triton.jit
def place(i, n1, n2, n3, n4, x_0, x_1, x_2, x_3, x_4):
    """Offset of element i in a tensor; the sizes 1 of unused dimensions cost nothing."""
    offset = (i % n4).to(tl.int64) * x_4
    i = i // n4
    offset += (i % n3).to(tl.int64) * x_3
    i = i // n3
    offset += (i % n2).to(tl.int64) * x_2
    i = i // n2
    return offset + (i % n1).to(tl.int64) * x_1 + (i // n1).to(tl.int64) * x_0


@triton.jit
def lerp(start, end, weight):
    """start where weight is 0 and end where it is 1, bit for bit, as torch.lerp has it."""
    away = end - start
    return tl.where(weight < 0.5, start + weight * away, end - away * (1 - weight))
