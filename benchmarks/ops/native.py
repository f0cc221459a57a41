"""What the native CPU kernels save: ours, composed PyTorch and the reference take turns.

`python -m tvkernels.benchmarks.ops.native [op ...]`: SD-1.x shapes with 8 frames in float32, and
the gradients of what is tuned at all but the finest level, where the reference's of fine-coarse
attention would hold 16 times the 1.6 GiB of 32 x 32. Ratios of medians; on a busy machine they
move, so run it on an idle one. Rows go to results/native.jsonl.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
import torch.nn.functional as F

import tvkernels
from tvkernels.benchmarks import RESULTS, limits, machine, stored, timing

ROWS = RESULTS / "native.jsonl"
BACKENDS = ("native", "cpu", "reference")
LEVELS = ((16, 1280), (32, 640), (64, 320))  # side of the tokens' grid, channels
FRAMES, HEADS = 8, 8
PATTERNS = {
    "fine-coarse, r = 2": tvkernels.FramePattern.fine_coarse(2),
    "[0; f - 1]": tvkernels.FramePattern.first_previous(),
}


# A variant's name, its call under a backend, and what its gradients are timed for.
Calls = Iterator[tuple[str, Callable[[str], torch.Tensor], list[torch.Tensor]]]


def _frame_attention(side: int, channels: int) -> Calls:
    q, k, v = leaves = [
        torch.randn(1, FRAMES, side * side, HEADS, channels // HEADS) for _ in range(3)
    ]
    for name, pattern in PATTERNS.items():
        yield (
            name,
            lambda b, p=pattern: tvkernels.frame_attention(
                q, k, v, p, grid=(side, side), backend=b
            ),
            leaves,
        )


def _temporal_attention(side: int, channels: int) -> Calls:
    fused = torch.randn(1, FRAMES, side * side, 3, HEADS, channels // HEADS)
    apart = [x.contiguous() for x in fused.unbind(3)]
    for name, given, leaves in (
        ("q, k, v apart", apart, apart), ("slices of one", fused.unbind(3), []),
    ):  # fmt: skip
        yield name, lambda b, x=given: tvkernels.temporal_attention(*x, backend=b), leaves


def _temporal_projected(side: int, channels: int) -> Calls:
    z, weights = torch.randn(1, FRAMES, side * side, channels), torch.randn(4, channels, channels)

    def block(backend: str) -> torch.Tensor:
        q, k, v = (F.linear(z, w).unflatten(-1, (HEADS, -1)) for w in weights[:3])
        out = tvkernels.temporal_attention(q, k, v, backend=backend)
        return F.linear(out.flatten(3), weights[3])

    yield "with projections", block, []


def _stam(side: int, channels: int) -> Calls:
    z = torch.randn(1, FRAMES, side * side, channels)
    weights = [torch.randn(channels, channels) * channels**-0.5 for _ in range(4)]
    sigmas = {"sigma_v": torch.ones(()), "sigma_out": torch.ones(())}
    call = tvkernels.shift_restricted_temporal_attention
    bias = torch.zeros(channels)
    yield (
        "", lambda b: call(z, *weights, bias, heads=HEADS, **sigmas, backend=b),
        [z, *weights, bias, *sigmas.values()],
    )  # fmt: skip


def _clip_group_norm(side: int, channels: int) -> Calls:
    x, w = torch.randn(1, FRAMES, channels, side, side), torch.randn(2, channels)
    last = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (1, FRAMES))
    for name, given, leaves in (("SiLU", x, [x]), ("SiLU, channels last", last, [])):
        yield (
            name, lambda b, x=given: tvkernels.clip_group_norm(x, *w, 32, silu=True, backend=b),
            leaves,
        )  # fmt: skip


def _guided_ddim_step(side: int, channels: int) -> Calls:
    sample, noise = torch.randn(1, FRAMES, 4, side, side), torch.randn(2, FRAMES, 4, side, side)
    step = torch.tensor([0.62, 0.71, 7.5])
    yield "", lambda b: tvkernels.guided_ddim_step(sample, noise, step, backend=b), []


def _token_map_attention(side: int, channels: int) -> Calls:
    q = torch.randn(1, FRAMES, side * side, HEADS, channels // HEADS)
    k, v = torch.randn(2, 1, 77, HEADS, channels // HEADS)
    words = torch.tensor([2, 5])
    yield "", lambda b: tvkernels.token_map_attention(q, k, v, words, backend=b), []


def _temporal_conv(side: int, channels: int) -> Calls:
    x = torch.randn(1, FRAMES, channels, side, side)
    w = torch.randn(channels, channels, 3) * channels**-0.5
    norm = {"norm_weight": torch.ones(channels), "norm_bias": torch.zeros(channels)}
    call = tvkernels.temporal_conv
    yield "norm, SiLU", lambda b: call(x, w, **norm, backend=b), [x, w]


CALLS = {
    "frame_attention": _frame_attention,
    "temporal_attention": _temporal_attention,
    "temporal_attention with projections": _temporal_projected,
    "shift_restricted_temporal_attention": _stam,
    "clip_group_norm": _clip_group_norm,
    "temporal_conv": _temporal_conv,
    "guided_ddim_step": _guided_ddim_step,
    "token_map_attention": _token_map_attention,
}


def _with_gradients(op: str, side: int, channels: int) -> Iterator[tuple[str, str, Callable]]:
    """(op, variant, backend -> what to time) of every call, and of the gradients alone."""
    for variant, call, leaves in CALLS[op](side, channels):
        yield op, variant, lambda b, c=call: lambda: c(b)
        if leaves and side < LEVELS[-1][0]:
            yield f"{op} gradients", variant, lambda b, c=call, x=leaves: _backward(c, x, b)


def _backward(call: Callable, leaves: list[torch.Tensor], backend: str) -> Callable:
    for x in leaves:
        x.requires_grad_()
    with torch.enable_grad():
        out = call(backend)
    outer = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, outer, retain_graph=True)


@torch.no_grad()
def main(ops: list[str]) -> int:
    """Times the ops, prints a line for each call and keeps its row; 2 for an unknown op."""
    unknown = [op for op in ops if op not in CALLS]
    if unknown:
        print(f"no op {unknown[0]} here: use {', '.join(CALLS)}", file=sys.stderr)
        return 2
    cpu = torch.device("cpu")
    facts = machine.facts(cpu) | {"date": machine.today()}
    for asked in ops or CALLS:
        for side, channels in LEVELS:
            for op, variant, timed in _with_gradients(asked, side, channels):
                candidates = [timing.Candidate(b, [timed(b)]) for b in BACKENDS]
                for candidate in candidates:
                    candidate.calls[0]()
                held = {c.name: timing.peak_bytes(c.calls[0], cpu) for c in candidates}
                # Beside each: within a run a shared machine's rates move by a third.
                rates = asdict(limits.measure_rates(cpu, torch.float32))
                times = timing.interleave(candidates, cpu, seconds=1.0)
                medians = {b: t.median_s for b, t in zip(BACKENDS, times, strict=True)}
                row = {"op": op, "variant": variant, "side": side, "channels": channels, **facts}
                row |= {f"{b}_s": s for b, s in medians.items()}
                row |= {f"{b}_bytes": held[b] for b in BACKENDS}
                stored.append(ROWS, row | rates)
                ratios = ", ".join(
                    f"{medians[b] / medians['native']:.2f} x {b}" for b in BACKENDS[1:]
                )
                print(f"{op} {side}x{side}/{channels} {variant}: "
                      f"{medians['native'] * 1e3:.2f} ms, {ratios}, "
                      f"{held['native'] / 2**20:.0f} of {held['reference'] / 2**20:.0f} MiB",
                      flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
