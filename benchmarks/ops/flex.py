"""frame_attention as FlexAttention: keys of all frames once, the pattern as a block mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tvkernels._dispatch import OPS
from tvkernels.benchmarks.ops.dense import Dense, Unfit, rows_of
from tvkernels.testing.spec import OpSpec

BLOCK = 128  # FlexAttention's own default


@dataclass(frozen=True)
class Flex(Dense):
    """`Dense` with heads before tokens, [B, H, N, D], and a mask of what reads what."""

    mask: Any = None


def flex_problem(spec: OpSpec, args) -> Flex:
    """The masked attention that stands for a call of frame_attention.

    Raises:
        Unfit: another op, or a pattern whose keys weigh differently.
    """
    if spec.name != "frame_attention":
        raise Unfit("a mask of blocks of 128 tokens has nothing to leave out here")
    q, k, _, pattern = args[0]
    frames, n, d = k.shape[1], k.shape[2], k.shape[4]
    if not q.numel():
        raise Unfit("there is nothing to attend to")
    grid, scale = args[1]["grid"], args[1].get("scale")
    rows = rows_of(pattern, frames)
    if any(len({s.count for s in row}) > 1 for row in rows):
        raise Unfit("a frame reads some keys more often than others, which a mask cannot say")
    levels = sorted({s.level for row in rows for s in row} | {0})
    pool = OPS["frame_attention"].backend("reference").pool
    tokens = [-(-grid[0] // level) * -(-grid[1] // level) if level else n for level in levels]

    def joined(x: Tensor) -> Tensor:
        parts = [(pool(x, *grid, level) if level else x).flatten(1, 2) for level in levels]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).transpose(1, 2)

    reads = torch.zeros(len(rows), sum(frames * t for t in tokens), dtype=torch.bool)
    starts = [sum(frames * t for t in tokens[:i]) for i in range(len(levels))]
    for f, row in enumerate(rows):
        for s in row:
            i = levels.index(s.level)
            first = starts[i] + s.frame * tokens[i]
            reads[f, first : first + tokens[i]] = True
    return Flex(
        lambda q, k, v, *_: (q.flatten(1, 2).transpose(1, 2), joined(k), joined(v)),
        lambda out: out.transpose(1, 2).reshape(q.shape).contiguous(),
        d**-0.5 if scale is None else scale,
        copies=len(levels) > 1,
        only_first=args[1].get("return_lse", False),
        mask=block_mask(reads, n, k.device),
    )


def block_mask(reads: Tensor, n: int, device: torch.device):
    """FlexAttention's block mask, made without the dense one.

    Args:
        reads: bool [F, M], the keys that each frame's queries read.
        n: queries of a frame.
    """
    from torch.nn.attention.flex_attention import BlockMask

    frames, m = reads.shape
    columns = -(-m // BLOCK)
    padded = torch.zeros(frames, columns * BLOCK, dtype=torch.bool)
    padded[:, :m] = reads
    blocks = padded.view(frames, columns, BLOCK)
    some, every = blocks.any(2), blocks.all(2)
    rows = [range(i * BLOCK // n, min(frames, -(-(i + 1) * BLOCK // n)))
            for i in range(-(-frames * n // BLOCK))]  # fmt: skip
    any_row = torch.stack([some[list(r)].any(0) for r in rows])
    all_row = torch.stack([every[list(r)].all(0) for r in rows])
    if frames * n % BLOCK:
        all_row[-1] = False  # a block that ends beyond the queries is not full
    table = reads.to(device)

    def mask_mod(b, h, q, k):
        return table[q // n, k]

    return BlockMask.from_kv_blocks(
        *_listed(any_row & ~all_row, device), *_listed(all_row, device),
        BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(frames * n, m),
    )  # fmt: skip


def _listed(chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """bool [rows, columns] -> how many are chosen in each row, and their numbers first."""
    count = chosen.sum(1, dtype=torch.int32)
    order = chosen.int().argsort(dim=1, descending=True, stable=True).int()
    return count[None, None].to(device), order[None, None].to(device)
