"""Patterns against lists written by hand, their tensors, their dense mask, and their errors."""

import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tvkernels import FramePattern, frame_attention
from tvkernels.patterns import MAX_LEVELS, FrameTable, pooled_counts

CLIP = (1, 2, 3, 8)
EVERY = {
    1: [[0]],
    2: [[0, 1], [1, 0]],
    3: [[0, 1, 2], [1, 0, 2], [2, 0, 1]],
    8: [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [1, 0, 2, 3, 4, 5, 6, 7],
        [2, 0, 1, 3, 4, 5, 6, 7],
        [3, 0, 1, 2, 4, 5, 6, 7],
        [4, 0, 1, 2, 3, 5, 6, 7],
        [5, 0, 1, 2, 3, 4, 6, 7],
        [6, 0, 1, 2, 3, 4, 5, 7],
        [7, 0, 1, 2, 3, 4, 5, 6],
    ],
}
OWN = {1: [[0]], 2: [[0], [1]], 3: [[0], [1], [2]], 8: [[f] for f in range(8)]}
FIRST = {1: [[0]], 2: [[0], [0]], 3: [[0], [0], [0]], 8: [[0]] * 8}
# Frame 0 and 1 name one frame twice and no other: a doubling of the whole row, dropped.
FIRST_PREVIOUS = {
    1: [[0]],
    2: [[0], [0]],
    3: [[0], [0], [0, 1]],
    8: [[0], [0], [0, 1], [0, 2], [0, 3], [0, 4], [0, 5], [0, 6]],
}
PREVIOUS_FIRST = {F: [row[::-1] for row in rows] for F, rows in FIRST_PREVIOUS.items()}
PREVIOUS_OWN = {
    1: [[0]],
    2: [[0], [0, 1]],
    3: [[0], [0, 1], [1, 2]],
    8: [[0], [0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [5, 6], [6, 7]],
}
MID = {1: [[0]], 2: [[0], [0]], 3: [[1], [1], [1]], 8: [[3]] * 8}

TABLE = {
    "plain UNet, StableVideo": (FramePattern.own(), OWN),
    "Tune-A-Video, TCVE": (FramePattern.first_previous(), FIRST_PREVIOUS),
    "BLD-AC eq. 6": (FramePattern.previous_own(), PREVIOUS_OWN),
    "Text2Video-Zero, Video-P2P": (FramePattern.first(), FIRST),
    "FateZero mid": (FramePattern.frames(anchors=["mid"]), MID),
    "FateZero default": (FramePattern.frames(offsets=[-1], anchors=["first"]), FIRST_PREVIOUS),
    "ControlVideo, FLATTEN 1, TokenFlow keys": (FramePattern.all(), EVERY),
    "Vid2Vid-Zero, its three layers": (FramePattern.all(), EVERY),
    "Vid2Vid-Zero, its others": (FramePattern.first_previous(), FIRST_PREVIOUS),
    "last by name": (FramePattern.frames(anchors=["last"]), {F: [[F - 1]] * F for F in CLIP}),
    "last by number": (FramePattern.frames(anchors=[-1]), {F: [[F - 1]] * F for F in CLIP}),
}


def fine(rows):
    return [[(frame, 0, 1) for frame in row] for row in rows]


def as_tuples(rows):
    return [[tuple(s) for s in row] for row in rows]


@pytest.mark.parametrize("frames", CLIP)
@pytest.mark.parametrize("method", TABLE)
def test_rows_of_each_method(method, frames):
    pattern, lists = TABLE[method]
    found = as_tuples(pattern.segments(frames))
    assert [sorted(row) for row in found] == [sorted(row) for row in fine(lists[frames])]


@pytest.mark.parametrize("ratio", (2, 4))
@pytest.mark.parametrize("frames", CLIP)
def test_ei2_reads_itself_fine_and_the_others_coarse(frames, ratio):
    expected = [[(row[0], 0, 1), *((j, ratio, 1) for j in row[1:])] for row in EVERY[frames]]
    assert as_tuples(FramePattern.fine_coarse(ratio).segments(frames)) == expected


def test_rave_reads_the_frames_of_its_grid_in_this_step():
    grids = [[4, 0, 7], [2, 5, 1], [3, 6, 8]]
    rows = [next(grid for grid in grids if f in grid) for f in range(9)]
    expected = fine(
        [
            [4, 0, 7], [2, 5, 1], [2, 5, 1], [3, 6, 8], [4, 0, 7],
            [2, 5, 1], [3, 6, 8], [4, 0, 7], [3, 6, 8],
        ]
    )  # fmt: skip
    assert as_tuples(FramePattern.rows(rows).segments(9)) == expected


@pytest.mark.parametrize(
    ("queries", "expected"),
    [((0,), [[0]]), ((1,), [[0]]), ((4,), [[0, 3]]), ((2, 7, 3), [[0, 1], [0, 6], [0, 2]])],
)
def test_pix2video_and_rerender_on_cached_frames(queries, expected):
    """Query frames are named in the cache's numbering; frames to come are not needed."""
    pattern = FramePattern.first_previous()
    assert as_tuples(pattern.segments(8, queries)) == fine(expected)
    table = pattern.table(8, queries=queries)
    assert table.row_ptr.tolist() == [0, *itertools.accumulate(map(len, expected))]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 8, 6, 2, 4, generator=generator) for _ in range(3))
    whole = frame_attention(q, k, v, pattern)
    part = frame_attention(q[:, list(queries)], k, v, table)
    torch.testing.assert_close(part, whole[:, list(queries)])


def test_a_frame_named_twice_counts_twice():
    rows = FramePattern.frames(anchors=["first", "mid"], offsets=[-1]).segments(5)
    assert as_tuples(rows) == [
        [(0, 0, 2), (2, 0, 1)],
        [(0, 0, 2), (2, 0, 1)],
        [(0, 0, 1), (2, 0, 1), (1, 0, 1)],
        [(0, 0, 1), (2, 0, 2)],
        [(0, 0, 1), (2, 0, 1), (3, 0, 1)],
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1, 1], [(1, 0, 1)]),
        ([0, 1, 0, 1], [(0, 0, 1), (1, 0, 1)]),
        ([0, 0, 0, 1, 1, 1], [(0, 0, 1), (1, 0, 1)]),
        ([0, 0, 1, 1, 1, 1], [(0, 0, 1), (1, 0, 2)]),
        ([0, 0, 1], [(0, 0, 2), (1, 0, 1)]),
        ([0, (0, 2), 0, (0, 2)], [(0, 0, 1), (0, 2, 1)]),
        ([0, (0, 2), 0], [(0, 0, 2), (0, 2, 1)]),
    ],
)
def test_only_a_doubling_of_the_whole_row_is_dropped(row, expected):
    assert as_tuples(FramePattern.rows([row]).segments(2)) == [expected]


def test_ragged_pooling_counts_what_is_there():
    assert pooled_counts((4, 4), 2).tolist() == [4, 4, 4, 4]
    assert pooled_counts((5, 3), 2).tolist() == [4, 2, 4, 2, 2, 1]
    assert pooled_counts((5, 7), 4).tolist() == [16, 12, 4, 3]
    assert pooled_counts((1, 1), 4).tolist() == [1]


def test_materialized_mask_by_hand():
    inf, two = math.inf, math.log(2)
    pattern = FramePattern.rows([[0, 0, 1], [(0, 2), 1]])
    # Grid (1, 3): three fine tokens a frame, then at level 2 two coarse ones (of 2 and 1 tokens).
    assert pattern.materialize(2, (1, 3)).tolist() == [
        pytest.approx([two, two, two, 0, 0, 0, -inf, -inf, -inf, -inf]),
        pytest.approx([-inf, -inf, -inf, 0, 0, 0, 0, 0, -inf, -inf]),
    ]
    sized = FramePattern.fine_coarse(2, size_bias=True).materialize(2, (1, 3))
    assert sized.tolist() == [
        pytest.approx([0, 0, 0, -inf, -inf, -inf, -inf, -inf, two, 0]),
        pytest.approx([-inf, -inf, -inf, 0, 0, 0, two, 0, -inf, -inf]),
    ]
    assert sized.dtype == torch.float64


def test_table_is_csr_in_int32():
    pattern = FramePattern.rows([[0, 0, (1, 4)], [1], [(0, 2), 2]])
    table = FramePattern.table(pattern, 3)
    assert isinstance(table, FrameTable)
    assert table.row_ptr.tolist() == [0, 2, 3, 5]
    assert table.segments.tolist() == [
        [0, 0, 2, 0], [1, 4, 1, 0], [1, 0, 1, 0], [0, 2, 1, 0], [2, 0, 1, 0],
    ]  # fmt: skip
    assert {t.dtype for t in table} == {torch.int32}
    assert table.levels.shape == (0, 2 + 2, 2 + 4, 2 + 3) and table.num_frames == 3
    assert table.coarse_levels == [2, 4]
    sized = FramePattern.fine_coarse(2, size_bias=True).table(2)
    assert sized.segments.tolist() == [[0, 0, 1, 0], [1, 2, 1, 1], [1, 0, 1, 0], [0, 2, 1, 1]]
    assert sized.coarse_levels == [2, 0]
    assert FramePattern.own().table(2).coarse_levels == [0] * MAX_LEVELS


def test_an_empty_clip_has_an_empty_table():
    table = FramePattern.own().table(0)
    assert table.row_ptr.tolist() == [0]
    assert table.segments.shape == (0, 4)


def test_a_pattern_is_compiled_once():
    pattern = FramePattern.frames(anchors=[0, "last"], offsets=[-1, 0])
    assert pattern.table(6).segments is FramePattern.table(pattern, 6).segments
    assert pattern.table(6).segments is not pattern.table(5).segments
    assert pattern.table(6, device="meta").segments.device.type == "meta"
    assert pattern.table(6).segments.device.type == "cpu"


def test_the_cache_holds_no_inference_tensors():
    pattern = FramePattern.rows([[0], [1, 0]])
    with torch.inference_mode():
        table = pattern.table(2)
    assert not any(t.is_inference() for t in table)
    q, k, v = (torch.randn(1, 2, 4, 1, 4, requires_grad=True) for _ in range(3))
    frame_attention(q, k, v, pattern).sum().backward()
    assert q.grad is not None


def test_the_cache_holds_no_fake_tensors():
    pattern = FramePattern.rows([[1], [0, 1], [2]])
    with FakeTensorMode():
        fake = pattern.table(3)
    assert fake.segments.shape == (4, 4)
    assert type(pattern.table(3).segments) is torch.Tensor
    assert pattern.table(3).row_ptr.tolist() == [0, 1, 3, 4]


def test_equal_patterns_are_one_key():
    assert FramePattern.own().is_own
    assert FramePattern.frames(offsets=[0]).is_own
    assert not FramePattern.previous_own().is_own
    assert hash(FramePattern.rows([[0], [1]])) == hash(FramePattern.rows([(0,), (1,)]))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: FramePattern.frames().segments(3), "query frame 0 reads no frame"),
        (lambda: FramePattern.rows([[0], []]).segments(2), "query frame 1 reads no frame"),
        (lambda: FramePattern.rows([[0], [0, 2]]).segments(2), "query frame 1 reads frame 2, but"),
        (lambda: FramePattern.rows([[-1]]).segments(2), "query frame 0 reads frame -1, but"),
        (lambda: FramePattern.frames(anchors=[5]).segments(3), "query frame 0 reads frame 5, but"),
        (lambda: FramePattern.frames(anchors=[-4]).segments(3), "query frame 0 reads frame -4"),
        (
            lambda: FramePattern.frames(anchors=[9]).segments(4, (2,)),
            "query frame 2 reads frame 9",
        ),
        (lambda: FramePattern.rows([[0], [(0, 1)]]).segments(2), "frame 1 reads frame 0 at level"),
        (lambda: FramePattern.rows([[(0, -2)]]).segments(1), "frame 0 reads frame 0 at level -2"),
        (lambda: FramePattern.first().segments(4, (3, 4)), "query frame 4 lies outside the clip"),
        (lambda: FramePattern.first().table(4, queries=(-1,)), "query frame -1 lies outside"),
        (lambda: FramePattern.rows([[0]]).segments(1, (0,)), "already names its query frames"),
        (lambda: FramePattern.frames(anchors=["midle"]).segments(2), "unknown anchor 'midle'"),
        (lambda: FramePattern.fine_coarse(1), "ratio of 2 or more"),
        (lambda: FramePattern.rows([[0, (0, 2), (0, 3), (0, 4)]]).table(1), "2 coarse levels"),
    ],
)
def test_errors_name_the_frame_at_fault(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_lists_fixed_in_length_refuse_another_clip():
    q, k, v = (torch.randn(1, 3, 4, 1, 4) for _ in range(3))
    with pytest.raises(ValueError, match="rows for 2 frames, q has 3"):
        frame_attention(q, k, v, FramePattern.rows([[0], [1]]))
    with pytest.raises(ValueError, match="rows for 8 frames, q has 3"):
        frame_attention(q, k, v, FramePattern.own().table(8))
