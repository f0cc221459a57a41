"""What an edit tells before its work: options without effect, names, sizes, what cannot run."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("av")
pytest.importorskip("diffusers")
pytest.importorskip("pydantic")

import torch
from safetensors.torch import save_file
from tiny_pipelines import save_model

from tvkernels import beforehand, edit
from tvkernels.config import ConfigError, EditSettings, parse_lora, resolve
from tvkernels.fronts import FRONTS, front
from tvkernels.pipelines import METHODS
from tvkernels.pipelines.checks import ModelError
from tvkernels.video import VideoError, write_video

TUNED = ("ei2", "tune-a-video", "tcve")
UNTUNED = ("frame-by-frame", "stable-video", "blended-diffusion")


class Reached(Exception):
    """The model is loaded: all that can be told before has been told."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beforehand")
    save_model(folder / "model")
    frames = np.random.default_rng(0).integers(0, 255, (4, 48, 32, 3), dtype=np.uint8)
    write_video(folder / "clip.mp4", frames, 8)
    shutil.copytree(folder / "model", folder / "short")
    schedule = folder / "short" / "scheduler" / "scheduler_config.json"
    told = json.loads(schedule.read_text(encoding="utf-8")) | {"num_train_timesteps": 100}
    schedule.write_text(json.dumps(told), encoding="utf-8")
    return folder


@pytest.fixture
def before(place, tmp_path, monkeypatch):
    """The settings that an edit begins its work with, and the lines it has said by then."""
    monkeypatch.setattr(edit, "frames_of", lambda given: 4)

    def before(method="ei2", told=None, **changes):
        given = {
            "clip": place / "clip.mp4", "model": str(place / "model"), "method": method,
            "source_prompt": "a red circle", "prompts": ["a blue star"], "frames": 2,
            "output": tmp_path / "out.mp4", "cache": tmp_path / "cache", "size": 32,
        } | changes  # fmt: skip
        given = {name: value for name, value in given.items() if value is not ...}
        lines, seen = [], {}

        def load(settings, *more):
            seen["settings"] = settings
            raise Reached

        monkeypatch.setattr(edit, "_load", load)
        with pytest.raises(Reached):
            edit.edit(resolve(given), [], lines.append, told)
        return seen["settings"], lines

    return before


# Field -> (a value that asks for something, methods where nothing can come of it, whether it is
# refused there or only said). Fields that every method honours have no methods.
OF_ALL = dict.fromkeys(
    ("clip", "method", "model", "prompts", "start", "stride", "frames", "size", "crop", "steps",
     "guidance", "dtype", "device", "backend", "output", "cache", "audio", "clip_skip", "variant",
     "lora", "embedding", "runtime", "max_memory"), (None, (), None),
)  # fmt: skip
FIELDS = OF_ALL | {
    "source_prompt": ("a red circle", ("frame-by-frame", "stable-video"), "said"),
    "negative_prompt": ("a star", (), None),
    "tune_steps": (3, UNTUNED, "refused"),
    "learning_rate": (1e-4, UNTUNED, "refused"),
    "weight_decay": (0.1, UNTUNED, "refused"),
    "gradient_checkpointing": (True, UNTUNED, "said"),
    "seed": (7, ("frame-by-frame", "blended-diffusion"), "said"),
    "output_dir": ("folder", tuple(METHODS), "said"),
    "words": (["red circle=blue star"], tuple({*METHODS} - {"blended-diffusion"}), "refused"),
    "mask": ("mask.png", tuple({*METHODS} - {"blended-diffusion", "stable-video"}), "refused"),
    **dict.fromkeys(
        ("foreground_prompt", "background_prompt"),
        ("a star", tuple({*METHODS} - {"stable-video"}), "refused"),
    ),
    **dict.fromkeys(
        ("controlnet_canny", "controlnet_depth", "depth_model"),
        ("model", tuple({*METHODS} - {"stable-video"}), "refused"),
    ),
    "atlas_dir": ("atlas", tuple({*METHODS} - {"stable-video"}), "refused"),
}


def test_every_setting_is_in_the_table():
    assert FIELDS.keys() == EditSettings.model_fields.keys()


@pytest.mark.parametrize("method", METHODS)
def test_an_option_without_effect_is_refused_or_said(before, method):
    needs = {"words": ["red circle=blue star"]} if method == "blended-diffusion" else {}
    for name, (value, without, how) in FIELDS.items():
        if how is None:
            continue
        asked = needs | {name: value}
        if method in without and how == "refused":
            with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}"):
                before(method, **asked)
        elif name in ("tune_steps", "learning_rate", "weight_decay", "seed", "output_dir",
                      "gradient_checkpointing", "source_prompt"):  # fmt: skip
            _, lines = before(method, **asked)
            said = any(line.startswith(f"{name} has no effect") for line in lines)
            assert said == (method in without), (name, lines)


def test_what_a_configuration_brings_is_said_only(before):
    """The record of a tuned edit runs again without tuning, or by a method that tunes nothing."""
    kept = {"tune_steps": 3, "learning_rate": 1e-3}
    _, lines = before("ei2", {"tune_steps"}, **kept | {"tune_steps": 0})
    assert "learning_rate has no effect: nothing is tuned" in lines
    _, lines = before("frame-by-frame", {"method"}, **kept)
    assert {line.partition(" ")[0] for line in lines} >= set(kept)
    with pytest.raises(ConfigError, match="--tune-steps has no effect"):
        before("frame-by-frame", {"method", "tune_steps"}, **kept)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("ei2", {"guidance": 1, "negative_prompt": "a star"}, "--negative-prompt has no effect"),
        ("ei2", {"tune_steps": 0, "learning_rate": 1e-3}, "--learning-rate has no effect"),
        ("ei2", {"tune_steps": 0, "source_prompt": ...}, None),
        ("ei2", {"source_prompt": ...}, "--source-prompt is missing"),
        ("frame-by-frame", {"source_prompt": ...}, None),
        ("blended-diffusion", {"source_prompt": ...}, "--source-prompt is missing"),
        ("ei2", {"prompts": [" "]}, "an empty prompt asks for nothing"),
        ("ei2", {"prompts": ["a", ""]}, "an empty prompt asks for nothing"),
        ("stable-video", {"foreground_prompt": ""}, "leaves the objects as they are"),
        ("stable-video", {"controlnet_depth": "d", "depth_model": "m"}, "-depth guides a part"),
        ("stable-video", {"foreground_prompt": "x", "prompts": ["a", "b"]}, "the same clip"),
        ("ei2", {"dtype": "fp16"}, "fp16 cannot be tuned"),
        ("ei2", {"dtype": "fp16", "tune_steps": 0}, None),
        ("frame-by-frame", {"dtype": "fp16"}, None),
        ("ei2", {"device": "cuda:7"}, "no device 'cuda:7' here: use auto or one of cpu"),
        ("ei2", {"runtime": "onnx", "size": (40, 48)}, "multiples of 64"),
        ("ei2", {"runtime": "onnx", "size": 64, "dtype": "bf16"}, "onnx cannot run here"),
        ("ei2", {"backend": "cuda"}, "the backend cuda cannot run here"),
        ("ei2", {"model": "short", "steps": 101}, "--steps: 101 steps: .* from 1 to 100"),
        ("ei2", {"model": "short", "steps": 50}, None),
        ("ei2", {"clip_skip": 9}, "--clip-skip 9 is more than"),
        ("ei2", {"lora": "gone.safetensors"}, "gone.safetensors is not there"),
        ("ei2", {"embedding": "gone.safetensors"}, "gone.safetensors is not there"),
        ("ei2", {"size": 10**6}, "--size 1000000: a frame of that size takes"),
        ("ei2", {"size": (8, 16392)}, "sides have 16384 pixels at most, not 16392"),
        ("ei2", {"variant": "fp16"}, "no variant fp16"),
        ("ei2", {"output": "."}, "cannot write .: it is no file's name"),
        ("ei2", {"output": "x" * 251 + ".mp4"}, r"x.json: its name has 256 bytes, .* 255"),
        ("ei2", {"model": "gone"}, "gone is no folder"),
        ("blended-diffusion", {"words": "red circle=blue ring"}, "'blue ring' is not in the"),
        ("blended-diffusion", {"prompts": ["x " * 90 + "star"], "words": "circle=star"}, "star"),
        ("ei2", {"frames": 9}, "ask for at most 4"),
        ("ei2", {"size": (50, 64)}, "the nearest is 64x48"),
        ("ei2", {"output": "out.gif", "clip": "fast"}, "at most 50 frames a second"),
    ],
)  # fmt: skip
def test_it_is_told_before_the_model_is_loaded(before, place, tmp_path, method, changes, message):
    if changes.get("clip") == "fast":
        write_video(tmp_path / "fast.mp4", np.zeros((2, 16, 16, 3), np.uint8), 60)
        changes = {"clip": tmp_path / "fast.mp4", "output": tmp_path / "out.gif"}
    if changes.get("model") == "short":
        changes = changes | {"model": str(place / "short")}
    if message is None:
        before(method, **changes)
        return
    with pytest.raises((ConfigError, ModelError, VideoError, ValueError), match=message) as caught:
        before(method, **changes)
    assert "\n" not in str(caught.value)


def test_embeddings_of_other_models_or_given_twice_are_told_before(before, tmp_path):
    mine, wide = tmp_path / "mine.safetensors", tmp_path / "wide.safetensors"
    save_file({"emb_params": torch.zeros(2, 16)}, mine)
    save_file({"emb_params": torch.zeros(2, 768)}, wide)
    with pytest.raises(ConfigError, match="it has 768 channels, the model's text 16"):
        before(embedding=[wide])
    with pytest.raises(ConfigError, match="has its word mine already"):
        before(embedding=[mine, mine])
    before(embedding=[mine])


def test_sizes_are_rounded_or_warned_of(before):
    settings, lines = before(size=43)
    assert tuple(settings.size) == (56, 40) and "size 43 becomes 40" in " ".join(lines)
    settings, lines = before(size="48x64")
    assert tuple(settings.size) == (64, 48)
    assert any("above the 32 pixels that the model was trained on" in line for line in lines)
    assert before(size=3)[0].size[1] == 8


def test_the_whole_clip_is_taken_unless_frames_are_asked_for(before):
    assert before(frames=...)[0].frames == 4
    assert before(frames=..., start=1, stride=2)[0].frames == 2
    assert before(frames=3)[0].frames == 3


def test_auto_is_what_the_device_takes_and_is_kept(before, monkeypatch):
    monkeypatch.setattr("tvkernels.devices.bfloat16_is_fast", lambda device: True)
    assert (before()[0].dtype, before()[0].device) == ("bf16", "cpu")
    assert before(model="embedded", size=64)[0].dtype == "fp32"
    assert before(dtype="fp32")[0].dtype == "fp32"
    assert before(runtime="onnx", size=(64, 64))[0].dtype == "fp32"


@pytest.mark.parametrize(
    ("prompts", "names"),
    [
        (["A blue star!", "a blue star", "a blue star 2"],
         ["a-blue-star", "a-blue-star-2", "a-blue-star-2-3"]),
        (["青い星", "हिन्दी तारा"], ["青い星", "हिन्दी-तारा"]),
        (["☆", "!"], ["edited", "edited-2"]),
        (["con", "COM¹", "console"], ["con-edited", "com¹-edited", "console"]),
        (["a/b\\c:d*?", "../up"], ["a-b-c-d", "up"]),
    ],
)  # fmt: skip
def test_clips_are_named_after_their_prompts(prompts, names):
    given = EditSettings(prompts=prompts, output_dir="out")
    assert [path.stem for path in beforehand.outputs_of(given)] == names


def test_no_name_is_longer_than_a_file_system_takes():
    for letter in ("a", "é", "青", "\U00020000"):
        name = beforehand.slug(letter * 300)
        assert 90 < len(name.encode()) <= beforehand.LONGEST and set(name) == {letter}


def test_the_weight_of_a_lora_stands_behind_its_last_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.safetensors", "take-12:30", "b:0.5"):
        (tmp_path / name).touch()
    found = {
        "a.safetensors": ("a.safetensors", 1), "a.safetensors:0.5": ("a.safetensors", 0.5),
        "a.safetensors:-1e-1": ("a.safetensors", -0.1), "take-12:30": ("take-12:30", 1),
        "take-12:30:2": ("take-12:30", 2), "b:0.5": ("b:0.5", 1), "gone:0.5": ("gone:0.5", 1),
        "C:\\a.safetensors": ("C:\\a.safetensors", 1),
    }  # fmt: skip
    assert {text: (str(parse_lora(text)[0]), parse_lora(text)[1]) for text in found} == found
    for weight in ("0", "nan", "inf"):
        with pytest.raises(ConfigError, match=f"weight {weight} of a.safetensors"):
            resolve({"lora": f"a.safetensors:{weight}"})


def test_a_full_disk_is_told_before_the_work(before, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=10))
    with pytest.raises(VideoError, match="its disk has 0.0 MB left"):
        before()


def test_every_front_is_of_a_method():
    assert FRONTS.keys() <= METHODS.keys()
    assert front("stable-video").stages == ("atlas",)
    assert front("ei2").stages == ("tuning", "inversion")
