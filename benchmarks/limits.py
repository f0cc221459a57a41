"""What a device can do at most, measured here and now, and the time below which no call can go.

limit = max(bytes / copy rate, flops / matrix rate, exponentials / exponential rate)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tvkernels.benchmarks.timing import seconds_of
from tvkernels.testing.spec import OpSpec

MIB = 2**20


@dataclass(frozen=True)
class Rates:
    """Measured rates of a device for one dtype, per second."""

    copied_bytes: float  # read and written, both counted
    flops: float  # of a matrix product
    exps: float
    l2_bytes: float | None  # read from L2; None on a CPU


@dataclass(frozen=True)
class Limit:
    """A call's counts and the least time they allow."""

    bytes: int
    flops: int
    exps: int
    seconds: float
    bound: str  # "bytes", "flops" or "exps": what takes that time


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Copy, matrix product, exponentials and L2 reads; about a second."""
    cuda = device.type == "cuda"
    # On two cores a product of 512 runs at half the rate of those from 1024 on.
    size = 8192 if cuda else 1536
    flops = 2 * size**3 / _product_seconds(size, device, dtype)
    # A CPU's stand-ins stay in its cache, so the limit is that of the cache.
    room = min(4096 * MIB, torch.cuda.mem_get_info(device)[0] // 4) if cuda else MIB
    copied = 2 * room / _copy_seconds(room, device)
    if cuda:
        return Rates(copied, flops, *_micro(device))
    x = _random(2**16, device=device)  # stays in the cache, as scores do
    out = torch.empty_like(x)
    exps = x.numel() / seconds_of(lambda: torch.exp2(x, out=out), device)
    return Rates(copied, flops, exps, None)


def _product_seconds(size: int, device: torch.device, dtype: torch.dtype) -> float:
    # Random numbers: zeros draw less power and run 13 % faster on an H200 (788 and 894 TFLOP/s).
    a, b = (_random(size, size, device=device).to(dtype) for _ in range(2))
    return seconds_of(lambda: a @ b, device)


def _random(*shape: int, device: torch.device) -> Tensor:
    # A graph that could not be captured leaves torch's own generator unusable.
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device)


def _copy_seconds(size: int, device: torch.device) -> float:
    source = _random(size // 4, device=device)
    target = torch.empty_like(source)
    return seconds_of(lambda: target.copy_(source), device)


def _micro(device: torch.device) -> tuple[float, float]:
    from tvkernels.benchmarks import micro

    out = torch.empty(micro.programs(device) * micro.BLOCK, device=device)
    exps = micro.exponentials(out, 4096) / seconds_of(
        lambda: micro.exponentials(out, 4096), device
    )
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    x = _random(l2 // 3 // 4 // micro.BLOCK * micro.BLOCK, device=device)
    return exps, micro.reads(x, out, 512) / seconds_of(lambda: micro.reads(x, out, 512), device)


def limit(
    spec: OpSpec, case: str, dtype: torch.dtype, rates: Rates, backward: bool = False
) -> Limit:
    """The counts of a case and the time they take at least.

    Args:
        backward: of forward and backward together. The backward is counted with twice the flops
            and as many bytes as the forward, and no exponentials: less than any op here needs.
    """
    parameters: Mapping[str, Any] = spec.cases[case]
    size = dtype.itemsize / 2  # the spec counts bytes of 16-bit elements
    counts = {
        "bytes": int(spec.bytes(parameters) * size) * (2 if backward else 1),
        "flops": spec.flops(parameters) * (3 if backward else 1),
        "exps": spec.exps(parameters),
    }
    times = {
        "bytes": counts["bytes"] / rates.copied_bytes,
        "flops": counts["flops"] / rates.flops,
        "exps": counts["exps"] / rates.exps,
    }
    bound = max(times, key=times.get)
    return Limit(**counts, seconds=times[bound], bound=bound)
