"""What frame_attention's backends hold at once: all live results of the operations inside."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from held import Held

from tvkernels import FramePattern, _native
from tvkernels._dispatch import OPS

FRAMES, TOKENS, HEADS, DIM, GRID = 8, 64, 2, 16, (8, 8)
FRAME = TOKENS * HEADS * DIM * 4  # bytes of one frame of q, k, v or the result
SLACK = FRAME // 8  # bias, log-sum-exp
PATTERNS = {
    "first_previous": FramePattern.first_previous(),
    "fine_coarse": FramePattern.fine_coarse(2),
}
every_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)


def held(pattern, backend, backward=False):
    table = pattern.table(FRAMES)
    args = [torch.randn(1, FRAMES, TOKENS, HEADS, DIM) for _ in range(3)]
    args += [table.row_ptr, table.segments, table.coarse_levels, *GRID, None, False]
    grad, op = torch.randn_like(args[0]), OPS["frame_attention"]
    module = op.backend(backend)
    with Held([args, grad]) as seen:
        if not backward:
            module.forward(*args)
        elif hasattr(module, "backward"):
            module.backward([grad, None], *args)
        else:
            op._recompute(module.forward, [grad, None], args)
    return seen


def gathered(pattern):
    """Bytes of the keys and values that each query frame reads, put together."""
    return [
        2 * FRAME * sum(1 if not s.level else 1 / s.level**2 for s in row)
        for row in pattern.segments(FRAMES)
    ]


def pooled(pattern):
    """Bytes of all frames' coarse keys and values."""
    return 2 * FRAMES * FRAME / pattern.others**2 if pattern.others else 0


def test_the_meter_counts():
    x = torch.ones(1000)
    with Held([x]) as seen:
        y = x.view(10, 100) + 1
        del y
        assert seen.now() == 0
        kept = [x + 1, x.view(10, 100), torch.zeros(500)]
        assert seen.now() == 6000
        torch.nn.functional.scaled_dot_product_attention(*[x.view(1, 1, 10, 100)] * 3)
    assert seen.at_attention == [6000]
    assert seen.most >= 6000 + kept[0].nbytes


@every_pattern
def test_cpu_forward_gathers_one_frame_at_a_time(pattern):
    seen = held(pattern, "cpu")
    assert len(seen.at_attention) == FRAMES
    for f, own in enumerate(gathered(pattern)):
        finished = f * FRAME + pooled(pattern) + SLACK * (f + 1)
        assert seen.at_attention[f] <= finished + own
        assert seen.between[f] <= finished + max(gathered(pattern))


@pytest.fixture
def few_scores(monkeypatch):
    """Bytes of the scores that the backward holds at a time, fewer than one frame's."""
    cpu = OPS["frame_attention"].backend("cpu")
    monkeypatch.setattr(cpu, "SCORES", TOKENS * HEADS)
    return 4 * TOKENS * HEADS


@every_pattern
def test_cpu_backward_gathers_one_frame_at_a_time(pattern, few_scores):
    sums = 3 * FRAMES * FRAME + pooled(pattern)
    # The gathered frame, dense by head, with its gradients; q, dq and the result's gradient.
    one = 3 * max(gathered(pattern)) + 3 * FRAME
    most = held(pattern, "cpu", backward=True).most
    assert most <= sums + pooled(pattern) + one + 4 * few_scores + SLACK


@every_pattern
@pytest.mark.parametrize("backward", (False, True), ids=("forward", "backward"))
def test_reference_holds_them_all(pattern, backward, few_scores):
    everything = sum(gathered(pattern))
    assert held(pattern, "reference", backward).most >= everything
    assert held(pattern, "cpu", backward).most < everything + 2 * backward * FRAMES * FRAME


def test_frames_that_read_themselves_copy_nothing():
    assert held(FramePattern.own(), "cpu").at_attention == [0]


# In a process of its own: what C++ allocates is seen only as resident memory, and memory that
# another call has given back would serve again unseen. The kernel's record of the most is reset
# before each call.
PEAKS = """
import sys
import torch
from tvkernels import FramePattern, frame_attention

def resident(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

frames, height, width, heads, dim = map(int, sys.argv[2:])
torch.set_num_threads(2)
pattern = FramePattern.fine_coarse(2)

def call(backend, grid):
    q, k, v = (torch.randn(1, frames, grid[0] * grid[1], heads, dim) for _ in range(3))
    open("/proc/self/clear_refs", "w").write("5")
    before = resident("VmRSS")
    frame_attention(q, k, v, pattern, grid=grid, backend=backend)
    return resident("VmHWM") - before

call(sys.argv[1], (2, 2))  # libraries and threads come first
print(call(sys.argv[1], (height, width)))
"""
NATIVE = _native.why_not("cpu", "frame_attention")
measured = pytest.mark.skipif(
    bool(NATIVE) or not Path("/proc/self/clear_refs").exists(),
    reason="; ".join(NATIVE) or "/proc says nothing of resident memory here",
)


def peak(backend, frames, grid, heads, dim):
    """Bytes that became resident during one call, its result included."""
    sizes = [str(x) for x in (frames, *grid, heads, dim)]
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, backend, *sizes], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@measured
def test_native_holds_the_result_the_coarse_frames_and_little_else():
    frames, grid, heads, dim = 8, (32, 32), 4, 40
    frame = 4 * grid[0] * grid[1] * heads * dim
    own = frames * frame + 2 * frames * frame / 4
    # Of each thread 0.15 MiB: 256 queries, their results, weights of a tile of keys.
    assert peak("native", frames, grid, heads, dim) <= own + 2**20


@measured
def test_native_peaks_at_a_fifth_of_the_reference_at_most():
    sizes = 8, (32, 32), 4, 40
    assert 5 * peak("native", *sizes) <= peak("reference", *sizes)
