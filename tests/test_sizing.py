"""Memory and time of an edit, told before it begins."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("pydantic")

import numpy as np
import torch
from clip_files import encode
from tiny_pipelines import loader, save_model

from tvkernels import sizing
from tvkernels.config import ConfigError, EditSettings
from tvkernels.demo.settings import method_numbers
from tvkernels.edit import frames_of
from tvkernels.runtime.memory import Account

CPU, F32 = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("sizing"))


def settings(model, method="frame-by-frame", **changes):
    numbers, _ = method_numbers(method, False)
    whole = {"tune_steps": numbers.tune_steps, "steps": 2, "guidance": 7.5, "frames": 40}
    given = {"method": method, "model": str(model), "size": (32, 32), "prompts": ["a"]}
    return EditSettings(**given | whole | changes), numbers


@pytest.fixture
def free(monkeypatch):
    """Sets how much is free."""
    return lambda size: monkeypatch.setattr(sizing, "free_memory", lambda device: size)


SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("ei2", "tcve")]


@pytest.mark.parametrize("method", [pytest.param("frame-by-frame", marks=pytest.mark.slow), *SLOW])
def test_a_long_clip_is_accounted_for_as_a_whole_account_does(model, method):
    asked, numbers = settings(model, method, frames=12)
    long = sizing.account_of(asked, numbers, F32)
    parts = [
        json.loads((model / part / "config.json").read_text(encoding="utf-8"))
        for part in ("unet", "vae", "text_encoder")
    ]
    whole = Account(*parts, numbers.recipe, frames=12, size=(32, 32), dtype=F32)
    assert method == "frame-by-frame" or long.tuning(False) == pytest.approx(
        whole.tuning(False), rel=0.1
    )
    assert long.sampling(2) == pytest.approx(whole.sampling(2), rel=0.1)
    assert long.coding(8) == whole.coding(8)
    assert long.weight_bytes() == whole.weight_bytes()
    assert long.of(10).sampling(2) < long.sampling(2)


def test_what_does_not_fit_is_refused_with_the_most_frames_that_do(model, free, monkeypatch):
    def account(frames):
        return SimpleNamespace(frames=frames, of=account)

    monkeypatch.setattr(sizing, "account_of", lambda asked, *more: account(asked.frames))
    monkeypatch.setattr(sizing, "peak", lambda asked, account: 10**4 + 1000 * account.frames)
    asked, numbers = settings(model)
    free(10**4 + 30_999)
    with pytest.raises(ConfigError, match="ask for --frames 30 or fewer, .*--max-memory"):
        sizing.check_memory(asked, numbers, CPU, F32)
    fits = asked.model_copy(update={"frames": 30})
    assert sizing.check_memory(fits, numbers, CPU, F32) == "memory 0.04MB by accounting"
    free(10**4)
    with pytest.raises(ConfigError, match="are free on cpu: a smaller --size"):
        sizing.check_memory(asked, numbers, CPU, F32)
    free(10**12)
    assert "by rough accounting" in sizing.check_memory(asked, numbers, CPU, F32)


def test_clips_that_memory_cannot_hold_are_not_read(model, free):
    """Also where the edit itself is not accounted for."""
    asked, _ = settings(model, "stable-video")
    free(30 * sizing.READ * 32 * 32)
    with pytest.raises(ConfigError, match="40 frames of 32 x 32 .* ask for --frames 30 or fewer"):
        sizing.check_read(asked)
    sizing.check_read(asked.model_copy(update={"frames": 30}))


@pytest.mark.parametrize("ending", ["mkv", "webm"])
def test_files_without_a_number_of_frames_are_counted_by_their_times(tmp_path, ending):
    pytest.importorskip("av")
    codec = {"mkv": "libx264", "webm": "libvpx"}[ending]
    frames = np.zeros((12, 32, 32, 3), np.uint8)
    clip = encode(tmp_path / f"clip.{ending}", frames, codec=codec)
    assert frames_of(EditSettings(clip=clip)) == 12
    assert frames_of(EditSettings(clip=clip, start=2, stride=3)) == 4


@pytest.mark.parametrize("method", ["frame-by-frame", *SLOW])
def test_the_rough_account_is_above_the_whole_one(model, free, method):
    asked, numbers = settings(model, method, frames=4)
    free(10**12)
    rough = sizing.check_memory(asked, numbers, CPU, F32)
    whole = sizing.peak(asked, sizing.account_of(asked, numbers, F32))
    assert sizing.parse_bytes(rough.split()[2]) > whole


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "stable-video"}, "of an atlas is not accounted for"),
        ({"runtime": "compile"}, "under compile is not accounted for"),
        ({"max_memory": "1GB"}, "under 1GB as planned"),
    ],
)
def test_what_is_not_accounted_for_is_said_and_not_refused(model, free, changes, words):
    free(1)
    asked, numbers = settings(model, **changes)
    assert words in sizing.check_memory(asked, numbers, CPU, F32)


def test_blended_diffusion_keeps_every_step(model):
    asked, numbers = settings(model, "blended-diffusion", steps=50, frames=4)
    account = sizing.account_of(asked, numbers, F32)
    channels, height, width = account.latents
    kept = 4 * 4 * 51 * (channels * height * width + 77 * (height // 2) * (width // 2))
    assert sizing.kept(asked, account) == kept
    assert sizing.kept(asked.model_copy(update={"mask": "m.png"}), account) < kept


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "9", "memory.current": "4", "memory.stat": "inactive_file 2"}, [7]),
        ({"memory.max": "max", "memory.current": "400", "memory.stat": ""}, []),
        ({"memory/memory.limit_in_bytes": "9", "memory/memory.usage_in_bytes": "4",
          "memory/memory.stat": "cache 1"}, [5]),
        ({}, []),
    ],
)  # fmt: skip
def test_a_containers_limit_counts(tmp_path, monkeypatch, files, left):
    monkeypatch.setattr(sizing, "CGROUPS", tmp_path)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert sorted(set(sizing._group_memory())) == left


def test_free_memory_is_what_the_device_says(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 9))
    assert sizing.free_memory(torch.device("cuda", 1)) == 5
    monkeypatch.setattr(sizing, "_group_memory", lambda: [7])
    assert sizing.free_memory(CPU) == 7


def test_seconds_come_from_a_timed_step(model, monkeypatch):
    pipe = loader(model)("ei2")
    before = {name: x.clone() for name, x in pipe.unet.state_dict().items()}
    monkeypatch.setattr(sizing, "_seconds", lambda call, device: call() and 2.0)
    asked, _ = settings(model, "ei2", frames=6, tune_steps=4, prompts=["a", "b"])
    steps = 2 * (1 + 2 * 2) + sizing.TUNING * 4
    assert sizing.expected_seconds(pipe, asked) == 6 * (2 / 2 * steps + 2 * (2 + 2))
    after = pipe.unet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    other = SimpleNamespace()
    assert sizing.expected_seconds(other, asked.model_copy(update={"runtime": "onnx"})) is None
    assert [sizing.spell(s) for s in (0.2, 99, 600, 7200)] == ["1 s", "99 s", "10 min", "2.0 h"]
