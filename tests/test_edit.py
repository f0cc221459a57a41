"""Edits on a model in miniature: what is said, what is kept, and files that users bring."""

import json
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("av")
pytest.importorskip("diffusers")
pytest.importorskip("pydantic")

import av
import PIL.Image
import single_files
import torch
from clip_files import encode
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from tiny_pipelines import save_model

from tvkernels import edit
from tvkernels.config import EditSettings, read_config, resolve
from tvkernels.fronts import front
from tvkernels.video import Video, write_video

FRAMES = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edit")
    save_model(folder / "model")
    unet = UNet2DConditionModel.from_pretrained(folder / "model", subfolder="unet")
    save_file(single_files.lora(unet), folder / "style.safetensors")
    save_file({"emb_params": torch.ones(1, 16)}, folder / "cat-toy.safetensors")
    write_video(folder / "clip.mp4", FRAMES, 8)
    wave = ("aac", np.zeros(22050, np.float32), 44100, 0)
    encode(folder / "sound.mp4", FRAMES, sound=wave)
    return folder


@pytest.fixture
def run(place, tmp_path):
    """An edit by one step: the lines that it says, and its record."""

    def run(clip="clip.mp4", output="out.mp4", notes=(), **changes):
        lines, given = [], {
            "clip": place / clip, "model": str(place / "model"), "method": "frame-by-frame",
            "prompts": ["a blue star"], "steps": 1, "frames": 2, "size": 32, "dtype": "fp32",
            "cache": False, "output": tmp_path / output,
        }  # fmt: skip
        edit.edit(resolve(given | changes), [*notes], lines.append)
        record = (tmp_path / output).with_suffix(".json")
        return lines, json.loads(record.read_text(encoding="utf-8"))

    return run


def streams(path) -> list[str]:
    with av.open(str(path)) as container:
        return sorted(stream.type for stream in container.streams)


def test_an_mp4_keeps_the_sound(run, tmp_path):
    lines, _ = run("sound.mp4")
    assert streams(tmp_path / "out.mp4") == ["audio", "video"]
    assert not any("sound is" in line for line in lines)
    lines, record = run("sound.mp4", audio=False)
    assert streams(tmp_path / "out.mp4") == ["video"]
    assert "no sound is written" in lines and record["settings"]["audio"] is False


@pytest.mark.parametrize(("name", "kept"), [("o.mp4", True), ("o.gif", False), ("o", False)])
def test_sound_that_cannot_be_kept_is_said(tmp_path, name, kept):
    lines, video = [], SimpleNamespace(audio="heard")
    found = edit.sound(EditSettings(), video, tmp_path / name, lines.append)
    assert found == ("heard" if kept else None)
    assert len(lines) == (not kept) and all("sound is left out" in line for line in lines)
    assert edit.sound(EditSettings(audio=False), video, tmp_path / name, lines.append) is None
    silent = SimpleNamespace(audio=None)
    assert edit.sound(EditSettings(), silent, tmp_path / name, lines.append) is None
    assert len(lines) == (not kept)


def test_a_lora_and_an_embedding_count_and_the_record_repeats_them(run, place, tmp_path):
    run()
    plain = (tmp_path / "out.mp4").read_bytes()
    brought = {
        "lora": f"{place / 'style.safetensors'}:0.5", "embedding": place / "cat-toy.safetensors",
        "prompts": ["a cat-toy star"], "clip_skip": 0,
    }  # fmt: skip
    _, record = run(**brought)
    edited = (tmp_path / "out.mp4").read_bytes()
    assert edited != plain
    assert record["settings"]["lora"] == [brought["lora"]]
    again, notes = read_config(tmp_path / "out.json")
    edit.edit(resolve(again | {"output": tmp_path / "b.mp4"}), notes, print)
    assert (tmp_path / "b.mp4").read_bytes() == edited
    lines, _ = run(**brought | {"prompts": ["a star"]})
    assert any("no prompt says cat-toy" in line for line in lines)


def test_a_whole_clip_says_frames_memory_and_seconds(run):
    lines, record = run(frames=None, stride=2)
    (line,) = [line for line in lines if "the whole clip is taken, 2 frames of 0.5 s" in line]
    assert "by rough accounting" in line and "about" in line and "--frames takes fewer" in line
    assert record["settings"]["frames"] == 2


def test_bfloat16_is_run_and_recorded(run, tmp_path):
    lines, record = run(dtype="bf16")
    assert record["settings"]["dtype"] == "bf16" and "in bf16 on cpu" in lines[0]
    low = (tmp_path / "out.mp4").read_bytes()
    run()
    assert (tmp_path / "out.mp4").read_bytes() != low


@pytest.mark.parametrize(
    ("method", "said", "kept"),
    [
        ("ei2", ["tuning done in", "inversion done in"], {"tuning": "off", "inversion": "off"}),
        ("frame-by-frame", ["inversion done in"], {"inversion": "off"}),
        ("blended-diffusion", ["inversion done in"], {"inversion": "off"}),
        ("stable-video", ["atlas made of the clip, nothing of the model is tuned or inverted, in"],
         {"atlas": "off"}),
    ],
)  # fmt: skip
def test_only_what_is_done_is_said_and_recorded(method, said, kept):
    done = []
    pipe = SimpleNamespace(
        fit=lambda *args, **options: done.append("fit"),
        invert=lambda *args, **options: done.append("invert"),
        set_progress_bar_config=lambda **options: None,
    )
    lines, clock = [], edit.Clock()
    settings = EditSettings(method=method, tune_steps=2 if method == "ei2" else 0, steps=1)
    video = SimpleNamespace(frames=FRAMES)
    assert edit.preprocess(pipe, video, settings, None, clock, lines.append) == kept
    assert [line[: len(text)] for line, text in zip(lines, said, strict=True)] == said
    assert done == (["fit"] if method == "stable-video" else ["fit", "invert"])


@pytest.mark.parametrize("method", ["blended-diffusion", "stable-video"])
def test_masks_follow_the_frames_that_are_taken(tmp_path, method):
    for index in range(4):
        mask = np.zeros((32, 32), np.uint8)
        mask[: 4 * (index + 1)] = 255
        PIL.Image.fromarray(mask).save(tmp_path / f"{index}.png")
    settings = EditSettings(method=method, mask=tmp_path, start=1, stride=2)
    video = Video(FRAMES[1::2], Fraction(4), tmp_path)
    own = front(method)
    found = own.fit(settings, video).get("masks") or [own.call(settings, video, "a")["mask"]]
    assert found[0].sum((1, 2)).tolist() == [8 * 32, 16 * 32]
