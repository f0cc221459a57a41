"""Triton kernels that measure a GPU's own rates: exponentials, and reads that hit L2."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tvkernels._triton.launch import launch

BLOCK = 1024
CONFIG = {"num_warps": 4, "num_stages": 1}  # 8 independent numbers a thread hide the latency


def exponentials(out: Tensor, rounds: int) -> int:
    """Runs 2**-x over and over in registers.

    Args:
        out: float32, a multiple of 1024 numbers; one program for each 1024.
        rounds: exponentials for each number.
    Returns:
        How many exponentials that is.
    """
    arguments = {"out": out, "rounds": rounds}
    launch(exponentials_kernel, (out.numel() // BLOCK,), arguments, CONFIG, BLOCK=BLOCK)
    return out.numel() * rounds


def reads(x: Tensor, out: Tensor, rounds: int) -> int:
    """Reads x over and over, every program from another place.

    Args:
        x: float32, a multiple of 1024 numbers, small enough for L2.
        out: float32, a multiple of 1024 numbers; one program for each 1024.
        rounds: blocks of 1024 numbers that each program reads.
    Returns:
        Bytes read.
    """
    arguments = {"x": x, "out": out, "blocks": x.numel() // BLOCK, "rounds": rounds}
    launch(reads_kernel, (out.numel() // BLOCK,), arguments, CONFIG, BLOCK=BLOCK)
    return out.numel() * rounds * x.element_size()


def programs(device: torch.device) -> int:
    """Programs of four warps that fill every multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count * 16


@triton.jit(do_not_specialize=["rounds"])
def exponentials_kernel(out, rounds, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.arange(0, BLOCK).to(tl.float32) / BLOCK
    for _ in range(rounds):
        x = tl.math.exp2(-x)
    tl.store(out + offsets, x)


@triton.jit(do_not_specialize=["rounds", "blocks"])
def reads_kernel(x, out, blocks, rounds, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    block = program % blocks
    for _ in range(rounds):
        # Past L1, which would answer the second time round.
        total += tl.load(x + block * BLOCK + lanes, cache_modifier=".cg")
        block = (block + 1) % blocks
    tl.store(out + program * BLOCK + lanes, total)
