"""`tvk bench pipelines` and `tvk bench memory`: compared first, counted exactly, fitted right."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")
pytest.importorskip("pydantic")
pytest.importorskip("rich")
pytest.importorskip("transformers")

from rich.console import Console
from tiny_unets import SD15, TINY

from tvkernels import FramePattern, frame_attention
from tvkernels.benchmarks import reference, timing
from tvkernels.benchmarks.edits import footprint, meter, models, pipelines, scaling, steps, turns
from tvkernels.benchmarks.reference import loop
from tvkernels.benchmarks.report import pipeline_tables
from tvkernels.config import ConfigError
from tvkernels.recipes import EI2, FRAME_BY_FRAME, RECIPES
from tvkernels.runtime.memory import Account

CPU = torch.device("cpu")
# One level each, for what is traced many times.
ONE_UNET = TINY | {"down_block_types": ("CrossAttnDownBlock2D",), "block_out_channels": (32,),
                   "up_block_types": ("CrossAttnUpBlock2D",)}  # fmt: skip
ONE_VAE = models.SD15_VAE | {"down_block_types": ("DownEncoderBlock2D",) * 2,
                             "up_block_types": ("UpDecoderBlock2D",) * 2,
                             "block_out_channels": (32, 32), "layers_per_block": 1}  # fmt: skip
ONE_TEXT = models.SD15_TEXT | {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 100,
                                "num_attention_heads": 4, "num_hidden_layers": 1}  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A model of random weights that is small."""
    monkeypatch.setitem(models.RANDOM, "tiny", TINY)


@pytest.fixture
def measured(tmp_path):
    """Runs the bench on the tiny model for as short as it can."""

    def go(*methods, frames=(2,), sizes=((64, 64),), **options):
        settings = {"model": "tiny", "steps": 1, "seconds": 0} | options.pop("settings", {})
        return pipelines.run(
            methods, frames, sizes, output=tmp_path / "rows.jsonl",
            settings=pipelines.Settings(**settings), **options,
        )  # fmt: skip

    return go


def test_rows_say_everything_and_are_on_disk(measured, tmp_path):
    said = []
    rows = measured("tune-a-video", say=said.append)
    assert [
        json.loads(s) for s in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    ] == rows
    assert [list(row) for row in rows] == [list(pipelines.FIELDS)] * 9 and len(said) == 9
    assert [row["phase"] for row in rows[::3]] == list(steps.STEPS)
    for row in rows:
        assert row["status"] == "timed", row["reason"]
        assert row["error"] <= row["limit"] and row["samples"] >= turns.FEWEST
        assert 0 < row["p20_s"] <= row["seconds"] <= row["p80_s"]
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["unet_calls"] == 1 and row["energy_j"] is None
        assert (row["frames"], row["size"], row["tokens"]) == (2, [64, 64], 64)
        assert row["device"].startswith("cpu: ") and row["date"]
    by = {(row["phase"], row["provider"]): row for row in rows}
    for provider in steps.PROVIDERS:
        one, two, tuned = (by[phase, provider] for phase in steps.STEPS)
        assert 1.9 < two["flops"] / one["flops"] < 2.1  # guidance
        # Most weights are frozen: gradients of what passes, and of few of them.
        assert 1.7 < tuned["flops"] / one["flops"] < 3
        assert tuned["peak_bytes"] > one["peak_bytes"]
    for phase in steps.STEPS:
        ours, plain, sdpa = (by[phase, name] for name in steps.PROVIDERS)
        assert ours["ratio"] == 1 and ours["error"] == 0 < plain["error"]
        assert sdpa["flops"] == pytest.approx(plain["flops"], rel=0.1)
        assert ours["peak_bytes"] < plain["peak_bytes"]
    console = Console(width=200, record=True, quiet=True)
    pipeline_tables.show(rows, console)


def test_a_wrong_reference_is_said_and_not_timed(measured, monkeypatch):
    right = loop.Reference.sample

    def wrong(self, latents, *args):
        found = right(self, latents, *args)
        return found + 0.05 * (found - latents).norm() / found.numel() ** 0.5

    monkeypatch.setattr(loop.Reference, "sample", wrong)
    ours, plain = measured("frame-by-frame", phases=["sampling"], providers=["reference"])
    assert plain["status"] == "wrong" and plain["seconds"] is None
    assert (
        plain["error"] == pytest.approx(0.05, rel=0.05) and "differs from ours" in plain["reason"]
    )
    assert ours["status"] == "timed"


def test_a_tuning_that_learns_something_else_is_seen(measured, monkeypatch):
    right = loop.Reference.tune

    def wrong(self, latents, prompt, count, rate, generator):
        right(self, latents, prompt, count, 2 * rate, generator)

    monkeypatch.setattr(loop.Reference, "tune", wrong)
    _, plain = measured("tune-a-video", phases=["tuning"], providers=["reference"])
    assert plain["status"] == "wrong"


def test_what_cannot_take_part_is_a_row_with_its_reason(measured, monkeypatch):
    monkeypatch.delitem(reference.REFERENCES, "frame-by-frame")
    rows = measured("frame-by-frame", phases=["inversion"], runtimes=["cuda_graph"])
    assert [row["status"] for row in rows] == ["timed"] + ["absent"] * 3
    assert "CUDA" in rows[1]["reason"] and "no reference" in rows[2]["reason"]

    def full(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    monkeypatch.setattr(meter, "Meter", full)
    ours, *_ = measured("frame-by-frame", phases=["sampling"], providers=["ours"])
    assert ours["status"] == "skipped" and "GiB by accounting" in ours["reason"]
    monkeypatch.undo()
    monkeypatch.setitem(models.RANDOM, "tiny", TINY)
    real, *_ = measured("frame-by-frame", phases=["sampling"], providers=["ours"])
    assert ours["peak_bytes"] == pytest.approx(real["peak_bytes"], rel=0.3)


def test_stable_video_has_one_picture_and_whole_phases_are_timed_once(measured):
    rows = measured("stable-video", frames=(1, 2), phases=["edit", "preprocessing"],
                    providers=["ours"], settings={"steps": 2})  # fmt: skip
    assert [(row["phase"], row["frames"], row["samples"]) for row in rows] == [
        ("edit", 1, 1), ("preprocessing", 1, 1),
    ]  # fmt: skip
    # The edit inverts the picture itself; preprocessing is that alone.
    assert [row["unet_calls"] for row in rows] == [4, 2]
    assert [row["method_steps"] for row in rows] == [1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phases": ["fit"]}, "unknown phase 'fit': use one of inversion"),
        ({"providers": ["theirs"]}, "unknown provider"),
        ({"runtimes": ["fast"]}, "unknown runtime"),
        ({"frames": (0,)}, "above zero"),
        ({"sizes": [(64, 60)]}, "size 60: use multiples of 8"),
        ({"settings": {"model": "sd9"}}, "unknown model 'sd9': use embedded, half-sd"),
        ({"settings": {"dtype": "int8"}}, "unknown dtype"),
    ],
)
def test_bad_input_is_one_line(measured, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        measured("frame-by-frame", **options)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="unknown method"):
        footprint.run(["ei3"])


def test_peaks_by_hand():
    x = torch.ones(1000)

    def call():
        y = x.exp()  # 4000 bytes
        z = torch.cat([y, y])  # 12000
        del y
        return z.view(2, 1000).exp()  # 16000

    assert timing.peak_bytes(call, CPU) == 16000
    assert timing.peak_bytes(lambda: [x.exp() for _ in range(3)], CPU) == 12000
    w = torch.ones(1000, requires_grad=True)

    def step():
        optimizer = torch.optim.SGD([w], lr=0.1)
        (w * w).sum().backward()
        assert w.grad is not None
        optimizer.zero_grad(set_to_none=True)

    # The product; then, in the sum's gradient, its two factors' gradients and theirs together.
    assert 8000 <= timing.peak_bytes(step, CPU) <= 16100


def test_the_meter_counts_by_hand():
    a, b = torch.randn(4, 8), torch.randn(8, 16)
    with meter.Meter() as counted:
        c = a @ b
        c.view(16, 4).relu_()
    assert counted.flops == 2 * 4 * 8 * 16
    assert counted.bytes == 4 * (4 * 8 + 8 * 16 + 4 * 16) + 4 * 2 * 64  # the second in place
    q = torch.randn(1, 2, 64, 2, 8, requires_grad=True)
    with meter.Meter() as counted:
        out = frame_attention(q, q, q, FramePattern.first_previous())
        once = counted.flops
        out.sum().backward()
    # Frame 0 reads itself once, frame 1 frame 0.
    assert once == 2 * 2 * 2 * 64 * 64 * 2 * 8
    assert counted.flops == 3 * once
    with meter.Meter() as counted:
        F.scaled_dot_product_attention(*[torch.randn(1, 2, 64, 8)] * 3)
    assert counted.flops == 2 * 2 * 64 * 64 * 2 * 8


def test_fits_are_least_squares_in_logarithms():
    generator = np.random.default_rng(0)
    x = np.array([1.0, 8, 16, 24, 48])
    y = 3 * x**1.7 * np.exp(0.1 * generator.normal(size=5))
    found = scaling.fit(x, y)
    (slope, start), covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    assert found.exponent == pytest.approx(slope) and found.scale == pytest.approx(np.exp(start))
    assert found.error == pytest.approx(covariance[0, 0] ** 0.5)
    left = np.log(y) - np.polyval([slope, start], np.log(x))
    assert found.residual == pytest.approx(np.sqrt(np.mean(left**2)))
    assert scaling.fit([2, 4], [3, 12]).exponent == pytest.approx(2)
    assert scaling.fit([2, 4], [3, 12]).error is None
    for xs, ys in (([2, 2], [1, 3]), ([1, 2], [0, 3])):
        with pytest.raises(ValueError, match="two different points"):
            scaling.fit(xs, ys)


def test_curves_are_of_rows_that_differ_in_one_thing(measured):
    row = dict.fromkeys(pipelines.FIELDS, "same")
    rows = [
        row | {"frames": f, "size": [s, s], "tokens": s * s // 64, "provider": provider,
               "seconds": f * s**4.0, "peak_bytes": f * f * s**2}
        for f in (1, 8) for s in (64, 128) for provider in ("ours", "reference")
    ] + [row | {"seconds": None}]  # fmt: skip
    found = {(c.quantity, c.against, round(c.fit.exponent, 6)) for c in scaling.curves(rows)}
    assert found == {
        ("seconds", "frames", 1), ("seconds", "tokens", 2),
        ("peak_bytes", "frames", 2), ("peak_bytes", "tokens", 1),
    }  # fmt: skip
    assert len(scaling.curves(rows)) == 2 * 2 * 2 * 2
    pipeline_tables.show([], Console(quiet=True))


def test_turns_and_ratios():
    order = []
    calls = [lambda name=name: order.append(name) for name in "ab"]
    found = turns.take_turns(calls, CPU, 0)
    assert order == list("abba") and [len(t.seconds) for t in found] == [2, 2]
    assert turns.take_turns([], CPU, 1) == []
    middle, low, high = turns.ratio([2.0, 8.0], [1.0, 2.0])
    assert middle == pytest.approx(8**0.5) and (low, high) == pytest.approx((2, 4))


def test_the_configurations_are_stable_diffusions():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**models.SD15_UNET)
        half = UNet2DConditionModel(**models.HALF_UNET)
    assert {name: unet.config[name] for name in SD15} == SD15
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert half.config.attention_head_dim == 8 and half.config.cross_attention_dim == 768
    one, other = (models.random_parts(TINY)["unet"].state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def account(recipe, frames):
    return Account(ONE_UNET, ONE_VAE, ONE_TEXT, recipe, frames=frames, size=(32, 32))


@pytest.mark.parametrize(
    "recipe", [FRAME_BY_FRAME, pytest.param(EI2, marks=pytest.mark.slow)], ids=("own", "ei2")
)
def test_the_longest_clip_is_the_accountings(recipe):
    counts = (6, 8, 10)  # more than one part of the feed-forwards
    points = [{"frames": n, **footprint.uses(account(recipe, n), True)} for n in counts]
    assert set(points[0]) == {"frames", *footprint.USES[: 3 if recipe.tuned else 1]}
    for use in set(points[0]) - {"frames"}:
        budgets = [int(points[0][use] * share) for share in (0.01, 1, 1.1, 1.2)]
        found = [footprint.clip(budget, points, use) for budget in budgets]
        assert found == sorted(found) and found[0] == 0
        # What holds the most may change with the frames: the line lies below, by a little.
        (x0, y0), (x1, y1), (x2, y2) = ((p["frames"], p[use]) for p in points)
        line = y2 - (y2 - y1) / (x2 - x1) * (x2 - x0)
        assert line - 1 <= y0 <= 1.02 * line
        assert footprint.clip(y2, points, use) == x2
        assert footprint.clip(y2 - 1, points, use) == x2 - 1


def test_fatezeros_store_is_what_its_users_met():
    """38.9 and 74.5 GB of maps; Q and K are 11 to 13 times smaller at 32 x 32."""
    for read, gigabytes, least in ((1, 38.9, 11.3), (2, 74.5, 12.8)):
        kept = footprint.stored_attention(8, read)
        assert (kept["self"] + kept["cross"]) / 1e9 == pytest.approx(gigabytes, abs=0.05)
        only = footprint.stored_attention(8, read, side=32)  # its levels are another model's
        assert kept["queries and keys"] < kept["self"] / 7 and only["self"] > 0
        n, width, keys = 1024, 640, 1 if read == 1 else 8
        assert 8 * 8 * n * n * read / ((8 + keys) * n * width) == pytest.approx(least, rel=0.02)


@pytest.mark.slow
def test_memory_rows(tmp_path):
    rows = footprint.run(["frame-by-frame"], (2, 4), ("float32",), output=tmp_path / "m.jsonl")
    assert [
        json.loads(s) for s in (tmp_path / "m.jsonl").read_text(encoding="utf-8").splitlines()
    ] == rows
    assert rows[0]["weight_bytes"] == 4 * (859_520_964 + 83_653_863 + 123_060_480) + 616
    assert list(rows[1]["longest"]["inference"].values()) == sorted(
        rows[1]["longest"]["inference"].values()
    )
    footprint.show(rows, Console(quiet=True))
    assert set(RECIPES) >= {row["method"] for row in rows}


@pytest.mark.slow
@pytest.mark.skipif(not meter.RESET.exists(), reason="/proc says nothing of resident memory here")
def test_a_fresh_process_tells_its_resident_peak(measured):
    settings = {"model": "embedded", "resident": True}
    ours, plain = measured(
        "frame-by-frame", frames=(8,), sizes=((128, 128),), phases=["sampling"],
        providers=["reference"], settings=settings,
    )  # fmt: skip
    for row in (ours, plain):
        assert row["resident_bytes"] > row["weight_bytes"] + row["peak_bytes"]
    more = plain["resident_bytes"] - ours["resident_bytes"]
    assert more > (plain["peak_bytes"] - ours["peak_bytes"]) / 2
