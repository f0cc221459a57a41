"""What an edit holds, by accounting: against budgets, and against what a run really holds."""

import json
import threading

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("av")
pytest.importorskip("diffusers")
pytest.importorskip("pydantic")
pytest.importorskip("transformers")

from tiny_unets import SD15

import tvkernels.edit
from tvkernels import FramePattern, frame_attention
from tvkernels._dispatch import OPS
from tvkernels.benchmarks.edits.models import SD15_TEXT as TEXT
from tvkernels.benchmarks.edits.models import SD15_VAE as VAE
from tvkernels.config import ConfigError, EditSettings, parse_bytes
from tvkernels.demo import MODEL_DIR
from tvkernels.demo.world import edit_pair
from tvkernels.recipes import EI2, FRAME_BY_FRAME, RECIPES
from tvkernels.runtime import memory
from tvkernels.runtime.memory import Account, BudgetError, Ledger, plan
from tvkernels.testing.calls import tensors
from tvkernels.video import VideoError, _encode, read_video, write_video

GB = 10**9


class Meter(TorchDispatchMode):
    """Bytes of storages made while it is on and still alive, at most: a witness of its own.

    The dead are looked for only where all that was ever made would be a new record.
    """

    def __init__(self, given=()):
        super().__init__()
        self.given = {StorageWeakRef(x.untyped_storage()).cdata for x in given}
        self.made, self.total, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "tvkernels":
            name = function._schema.name.partition("::")[2]
            op = OPS[name.removesuffix("_backward")]
            with memory._Autograd(), self:
                result = (op._run if name == op.name else op._run_backward)(*args)
        else:
            result = function(*args, **(kwargs or {}))
        for x in tensors(result):
            ref = StorageWeakRef(x.untyped_storage())
            if ref.cdata in self.given or x.device.type != "cpu":
                continue
            before = self.made.pop(ref.cdata, (None, 0))[1]
            self.made[ref.cdata] = (ref, x.untyped_storage().nbytes())
            self.total += x.untyped_storage().nbytes() - before
        if self.total > self.most:
            self.made = {key: made for key, made in self.made.items() if not made[0].expired()}
            self.total = sum(size for _, size in self.made.values())
            self.most = max(self.most, self.total)
        return result


def test_the_ledger_counts_what_lives():
    x = torch.ones(1000)
    with Ledger([x]) as ledger:
        y = x.view(10, 100) + 1
        assert (ledger.now, ledger.peak) == (4000, 4000)
        z = y.t()
        del y
        assert ledger.now == 4000
        del z
        assert ledger.now == 0
        x.add_(1)
        assert (ledger.now, ledger.peak) == (0, 4000)


def test_the_ledger_looks_into_our_ops():
    q = torch.randn(1, 4, 64, 2, 16)
    with Ledger([q]) as ledger:
        out = frame_attention(q, q, q, FramePattern.fine_coarse(2), grid=(8, 8), backend="cpu")
        assert ledger.now >= out.nbytes
    assert ledger.peak > 2 * out.nbytes  # keys and values, pooled and gathered


@pytest.mark.parametrize("pattern", [FramePattern.first_previous(), FramePattern.fine_coarse(2)])
@pytest.mark.parametrize("scores", [2**10, 2**22])
def test_what_frame_attention_holds_backwards_is_written_down_right(pattern, scores, monkeypatch):
    cpu = OPS["frame_attention"].backend("cpu")
    monkeypatch.setattr(cpu, "SCORES", scores)
    table = pattern.table(8)
    q, k, v, grad = (torch.randn(2, 8, 64, 2, 16) for _ in range(4))
    args = [q, k, v, table.row_ptr, table.segments, table.coarse_levels, 8, 8, None, False]
    with Meter([q, k, v, grad]) as meter:
        cpu.backward([grad, None], *args)
    told = memory.frame_attention_backward_bytes(*args)
    assert meter.most <= told <= 1.3 * meter.most, (meter.most, told)


@pytest.fixture(scope="module")
def sd15():
    """Recipe -> the account of 8 frames of 512 x 512 on the real configuration."""
    made = {}

    def make(recipe):
        if recipe.name not in made:
            made[recipe.name] = Account(SD15, VAE, TEXT, recipe, frames=8, size=(512, 512))
        return made[recipe.name]

    return make


def test_the_weights_of_stable_diffusion_are_counted(sd15):
    account = sd15(FRAME_BY_FRAME)
    assert account.weights["unet"] == {"float32": 859_520_964 * 4}
    assert account.weights["vae"] == {"float32": 83_653_863 * 4}
    assert account.weights["text_encoder"]["float32"] == 123_060_480 * 4
    half = Account(SD15, VAE, TEXT, FRAME_BY_FRAME, frames=8, size=(512, 512), dtype=torch.float16)
    assert half.weights["unet"] == {"float16": 859_520_964 * 2}


# budget in GB, device -> VAE frames at once, guidance in two calls, checkpointing, offload
SD15_PLANS = {
    "frame-by-frame": {
        (12, "cpu"): (8, False, False, False),
        (8, "cpu"): (4, False, False, False),
        (6, "cpu"): (2, False, False, False),
        (4.6, "cuda"): (4, True, False, True),
    },
    "ei2": {
        (20, "cpu"): (8, False, False, False),
        (12, "cpu"): (8, False, True, False),
        (9, "cpu"): (4, False, True, False),
        (8, "cuda"): (8, False, True, True),
    },
}


slow_ei2 = pytest.param("ei2", marks=pytest.mark.slow)


@pytest.mark.parametrize("method", ["frame-by-frame", slow_ei2])
def test_budgets_on_the_real_configuration(sd15, method):
    recipe, peaks = RECIPES[method], []
    for (gb, device), expected in SD15_PLANS[method].items():
        found = plan(int(gb * GB), sd15(recipe), tune=bool(recipe.tuned), device=device)
        chosen = (
            found.chunk, found.split_guidance, found.gradient_checkpointing, found.offload
        )  # fmt: skip
        assert chosen == expected, (gb, str(found))
        assert found.peak <= gb * GB and found.tile is None
        peaks.append(found.peak)
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < peaks[0] / 2


def test_tuning_is_planned_for():
    """On two wide levels: what the plan adds up are steps of the whole UNet, forth and back."""
    unet, *others = demo_configs()
    unet |= {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "layers_per_block": 1,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "block_out_channels": (192, 192),
    }  # fmt: skip
    account = Account(unet, *others, EI2, frames=FRAMES, size=(SIZE, SIZE))
    found = plan(GB, account, tune=True, checkpointing=True)
    assert found.gradient_checkpointing and found.chunk == FRAMES
    assert found.peaks["tuning"] == found.peak > found.peaks["sampling"]


@pytest.mark.slow
def test_tuning_is_planned_for_on_the_real_configuration(sd15):
    found = plan(9 * GB, sd15(EI2), tune=True, checkpointing=True)
    assert found.gradient_checkpointing and found.chunk == 4
    assert found.peaks["tuning"] == found.peak > found.peaks["sampling"]


@pytest.mark.parametrize(
    ("model", "method", "budget", "weights"),
    [
        ("demo", "frame-by-frame", 29 * 10**6, "29.9MB"),
        pytest.param("sd15", "frame-by-frame", 4 * GB, "4", marks=pytest.mark.slow),
        pytest.param("sd15", "ei2", 4 * GB, "4", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_held_is_told_with_the_least_that_would_do(
    request, model, method, budget, weights
):
    account = request.getfixturevalue(model)(RECIPES[method])
    tune = bool(RECIPES[method].tuned)
    with pytest.raises(
        BudgetError, match=f"would do, of which the weights are {weights}"
    ) as caught:
        plan(budget, account, tune=tune)
    assert "\n" not in str(caught.value)
    least = parse_bytes(str(caught.value).partition("edit: ")[2].split()[0])
    assert plan(least, account, tune=tune).peak <= least
    with pytest.raises(BudgetError):
        plan(least - least // 500, account, tune=tune)


def test_tiles_come_last():
    account = Account(SD15, VAE, TEXT, FRAME_BY_FRAME, frames=1, size=(512, 512))
    exact = account.weight_bytes() + account.coding(1)
    assert plan(exact, account, tune=False).tile is None
    found = plan(exact - 1, account, tune=False)
    assert found.tile == 256 and found.chunk == 1
    assert "changes the picture" in str(found)


FRAMES, SIZE = 4, 64


def demo_configs():
    """Of the demo model's UNet, VAE and text encoder."""
    return [
        json.loads((MODEL_DIR / part / "config.json").read_text(encoding="utf-8"))
        for part in ("unet", "vae", "text_encoder")
    ]


@pytest.fixture(scope="module")
def demo():
    """Recipe -> the account of the demo model's edit."""
    made = {}

    def make(recipe):
        if recipe.name not in made:
            made[recipe.name] = Account(*demo_configs(), recipe, frames=FRAMES, size=(SIZE, SIZE))
        return made[recipe.name]

    return make


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A real edit of the demo model: what its tensors held at most, and its record."""
    write_video(tmp_path / "clip.mp4", edit_pair(0)[0].render(SIZE, SIZE).frames[:FRAMES], 8)

    def run(method, **changes):
        found, load = {}, tvkernels.edit.load_pipeline

        def metered(*args, **options):
            found["pipe"] = pipe = load(*args, **options)
            given = [
                x
                for module in (pipe.unet, pipe.vae, pipe.text_encoder)
                for name, x in module.state_dict(keep_vars=True).items()
                if "attn_temp" not in name  # tuning puts new ones in their place
            ]
            # What state_dict leaves out is small and made again, too.
            found["weights"] = sum(x.nbytes for x in given)
            found["meter"] = Meter(given)
            found["meter"].__enter__()
            return pipe

        if load is not None:
            monkeypatch.setattr(tvkernels.edit, "load_pipeline", metered)
        settings = EditSettings(
            clip=tmp_path / "clip.mp4", method=method, source_prompt="a red circle",
            prompts=["a blue star"], frames=FRAMES, size=SIZE, steps=1, cache=False,
            tune_steps=2 if RECIPES[method].tuned else None, output=tmp_path / "out.mp4",
        )  # fmt: skip
        try:
            tvkernels.edit.edit(settings.model_copy(update=changes), [], lambda text: None)
        finally:
            if "meter" in found:
                found["meter"].__exit__(None, None, None)
            monkeypatch.undo()
        assert len(read_video(tmp_path / "out.mp4")) == FRAMES
        record = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
        return found["weights"] + found["meter"].most, record

    return run


@pytest.mark.parametrize("method", ["frame-by-frame", slow_ei2])
def test_budgets_are_held_in_a_real_run(demo, run, method):
    """From what the quickest plan needs down to the least that any does."""
    recipe = RECIPES[method]
    account, tune = demo(recipe), bool(recipe.tuned)
    with pytest.raises(BudgetError) as caught:
        plan(1, account, tune=tune)
    least = parse_bytes(str(caught.value).partition("edit: ")[2].split()[0])
    most = plan(GB, account, tune=tune).peak
    plans = []
    for budget in (most, (most + least) // 2, least):
        real, record = run(method, max_memory=f"{budget / 1000:.3f}KB")
        told = record["memory"]
        assert real <= told["peak"] <= budget
        assert real > 0.95 * told["peak"], "the accounting is not the run's"
        plans.append({**told, "budget": 0, "peaks": 0, "peak": 0})
    assert plans[0] != plans[-1]


def test_a_run_of_more_than_the_plan_is_seen(demo, run):
    """The meter can fail: without its plan the edit holds more than the least budget."""
    account = demo(FRAME_BY_FRAME)
    with pytest.raises(BudgetError) as caught:
        plan(1, account, tune=False)
    least = parse_bytes(str(caught.value).partition("edit: ")[2].split()[0])
    real, record = run("frame-by-frame")
    assert record["memory"] is None
    assert real > least


def test_as_many_frames_wait_as_are_accounted():
    assert _encode.QUEUED == memory.QUEUED


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_memory": "29MB"}, "max_memory: 29MB cannot hold this edit: .* would do"),
        ({"max_memory": "1GB", "runtime": "compile"}, "accounts for the eager runtime"),
        pytest.param(
            {"runtime": "cuda_graph"},
            "the runtime cuda_graph cannot run here: ",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it can run here"),
        ),
    ],
)
def test_what_cannot_be_is_said_before_weights_are_loaded(run, monkeypatch, changes, message):
    monkeypatch.setattr(tvkernels.edit, "load_pipeline", None)
    with pytest.raises(ConfigError, match=message) as caught:
        run("frame-by-frame", **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip"])
@pytest.mark.parametrize("shape", [(5, 16, 16, 3), (40, 15, 17, 3)])
def test_frames_written_as_they_come_give_the_same_bytes(tmp_path, name, shape):
    frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    whole = write_video(tmp_path / "whole" / name, frames, 8)
    streamed = write_video(tmp_path / "streamed" / name, iter(frames), 8)
    pairs = [(whole, streamed)]
    if whole.is_dir():
        pairs = [(file, streamed / file.name) for file in whole.iterdir()]
        assert len(pairs) == len(frames) == len(list(streamed.iterdir()))
    assert all(a.read_bytes() == b.read_bytes() for a, b in pairs)


def test_frames_are_made_no_further_ahead_than_the_queue(tmp_path, monkeypatch):
    made, gate = [], threading.Event()

    def slow(path, frames, fps):
        assert gate.wait(10)
        path.write_bytes(b"".join(frame.tobytes() for frame in frames))

    def source():
        for index in range(60):
            made.append(index)
            if len(made) == _encode.QUEUED + 1:
                assert not gate.is_set()
                gate.set()
            yield np.full((8, 8, 3), index, np.uint8)

    monkeypatch.setitem(_encode.ENCODERS, ".mp4", slow)
    path = write_video(tmp_path / "clip.mp4", source(), 8)
    assert path.read_bytes()[:: 8 * 8 * 3] == bytes(range(60))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("after", [1, 20])
@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip"])
def test_what_stops_the_decoder_leaves_no_half_file(tmp_path, name, after, error):
    def source():
        for _ in range(after):
            yield np.zeros((16, 16, 3), np.uint8)
        raise error

    before = threading.active_count()
    with pytest.raises(error):
        write_video(tmp_path / name, source(), 8)
    assert not list(tmp_path.iterdir())
    assert threading.active_count() == before


def test_what_stops_the_encoder_stops_the_decoder(tmp_path, monkeypatch):
    made = []

    def full(path, frames, fps):
        path.write_bytes(b"half")
        next(frames)
        raise OSError(28, "No space left on device")

    def source():
        while True:
            made.append(1)
            yield np.zeros((16, 16, 3), np.uint8)

    monkeypatch.setitem(_encode.ENCODERS, ".mp4", full)
    with pytest.raises(VideoError, match="No space left"):
        write_video(tmp_path / "clip.mp4", source(), 8)
    assert not list(tmp_path.iterdir())
    assert len(made) < 1000


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "at least one frame"),
        ([np.zeros((4, 4), np.uint8)], "must be uint8"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 6, 3), np.uint8)], "of one size"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.float32)], "must be uint8"),
    ],
)
def test_frames_that_come_one_by_one_are_checked(tmp_path, frames, message):
    with pytest.raises(VideoError, match=message):
        write_video(tmp_path / "clip.mp4", iter(frames), 8)
    assert not list(tmp_path.iterdir())
