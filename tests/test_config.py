"""Settings from YAML: our names, Tune-A-Video's, and what is refused."""

import json
from pathlib import Path

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("yaml")

from tvkernels.config import ConfigError, EditSettings, parse_bytes, read_config, resolve
from tvkernels.runtime import BACKENDS

# configs/man-skiing.yaml of github.com/showlab/Tune-A-Video, whole.
MAN_SKIING = """
pretrained_model_path: "./checkpoints/stable-diffusion-v1-4"
output_dir: "./outputs/man-skiing"

train_data:
  video_path: "data/man-skiing.mp4"
  prompt: "a man is skiing"
  n_sample_frames: 24
  width: 512
  height: 512
  sample_start_idx: 0
  sample_frame_rate: 2

validation_data:
  prompts:
    - "Spider Man is skiing on the beach, cartoon style"
    - "Wonder Woman, wearing a cowboy hat, is skiing"
  video_length: 24
  width: 512
  height: 512
  num_inference_steps: 50
  guidance_scale: 12.5
  use_inv_latent: True
  num_inv_steps: 50

learning_rate: 3e-5
train_batch_size: 1
max_train_steps: 500
checkpointing_steps: 1000
validation_steps: 100
trainable_modules:
  - "attn1.to_q"
  - "attn2.to_q"
  - "attn_temp"

seed: 33
mixed_precision: fp16
use_8bit_adam: False
gradient_checkpointing: True
enable_xformers_memory_efficient_attention: True
"""


@pytest.fixture
def read(tmp_path):
    def read(text: str):
        path = tmp_path / "edit.yaml"
        path.write_text(text, encoding="utf-8")
        return read_config(path)

    return read


def test_a_tune_a_video_file_is_understood_whole(read):
    given, notes = read(MAN_SKIING)
    settings = resolve(given)
    assert settings == EditSettings(
        clip=Path("data/man-skiing.mp4"),
        method="tune-a-video",
        model="./checkpoints/stable-diffusion-v1-4",
        source_prompt="a man is skiing",
        prompts=[
            "Spider Man is skiing on the beach, cartoon style",
            "Wonder Woman, wearing a cowboy hat, is skiing",
        ],
        frames=24,
        start=0,
        stride=2,
        size=(512, 512),
        crop=False,
        tune_steps=500,
        learning_rate=3e-5,
        steps=50,
        guidance=12.5,
        seed=33,
        gradient_checkpointing=True,
        output_dir=Path("outputs/man-skiing"),
    )
    silent = ("checkpointing_steps", "validation_steps", "mixed_precision", "enable_xformers")
    assert len(notes) == 4
    assert all(any(name in note for note in notes) for name in silent)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("use_8bit_adam: False", "use_8bit_adam: True", "use_8bit_adam cannot be True"),
        ("use_inv_latent: True", "use_inv_latent: False", "starts from the inverted clip"),
        ("train_batch_size: 1", "train_batch_size: 2", "one clip is tuned at a time"),
        ('  - "attn_temp"\n', "", "belongs to the method's recipe"),
        ("video_length: 24", "video_length: 8", "n_sample_frames is 24 and .*video_length is 8"),
        ("num_inv_steps: 50", "num_inv_steps: 20", "steps is 50 and .*num_inv_steps is 20"),
        ("seed: 33", "seed: 33\nlr_scheduler: cosine", "learning rate is constant"),
        ("seed: 33", "seed: 33\nseeed: 4\nframes_per: 2", "unknown keys: seeed, frames_per"),
        ("seed: 33", "model: other", "pretrained_model_path is .* and model is 'other'"),
        ("sample_frame_rate: 2", "sample_frame_rat: 2", "train_data.sample_frame_rat"),
    ],
)
def test_what_cannot_be_honoured_is_refused(read, old, new, message):
    assert old in MAN_SKIING
    with pytest.raises(ConfigError, match=message):
        read(MAN_SKIING.replace(old, new, 1))


def test_the_default_of_an_only_value_passes(read):
    given, _ = read("adam_epsilon: 1e-08\nmethod: ei2")
    assert given == {"method": "ei2"}


def test_the_weight_decay_of_a_tune_a_video_file_is_honoured(read):
    given, _ = read("adam_weight_decay: 1e-2\nmethod: tcve")
    assert resolve(given).weight_decay == 0.01


def test_our_own_names(read):
    given, notes = read("clip: a.mp4\nprompt: a star\nmethod: ei2\nsize: [64, 96]\ncache: false")
    settings = resolve(given)
    assert (settings.prompts, settings.size, settings.cache) == (["a star"], (64, 96), False)
    assert settings.crop
    assert not notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", "not valid YAML"),
        ("just words", "holds no settings"),
        ("", "holds no settings"),
        ("train_data: clip.mp4", "train_data must hold keys"),
        ("train_data: {width: 64}", "width and height come together"),
        ("size: 64\ntrain_data: {width: 64, height: 64}", "either size or"),
    ],
)
def test_files_that_are_no_settings(read, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read(text)
    assert "\n" not in str(caught.value)
    assert "edit.yaml" in str(caught.value)


def test_a_record_of_a_method_that_tunes_nothing_can_be_run_again(read):
    settings = {"method": "frame-by-frame", "learning_rate": 0.0, "tune_steps": 0}
    found, _ = read(json.dumps({"settings": settings, "versions": {}}))
    assert resolve(found).learning_rate is None and found["method"] == "frame-by-frame"


def test_a_configuration_in_other_encodings(tmp_path):
    path, text = tmp_path / "edit.yaml", "prompt: ein grüner Stern"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_text(text, encoding=encoding)
        assert read_config(path)[0] == {"prompts": ["ein grüner Stern"]}
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match="edit.yaml is no text in UTF-8: save it as UTF-8"):
        read_config(path)


def test_a_record_without_settings(read):
    for broken in (None, [1]):
        with pytest.raises(ConfigError, match="holds no settings"):
            read(json.dumps({"settings": broken, "versions": {}}))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*gone.yaml: No such file"):
        read_config(tmp_path / "gone.yaml")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"frames": 0}, "frames: .*not 0"),
        ({"steps": 1000}, "steps: .*999"),
        ({"learning_rate": -1.0}, "learning_rate: "),
        ({"guidance": float("nan")}, "guidance: "),
        ({"backend": "cudnn"}, "backend: .*'auto'.*not 'cudnn'"),
        ({"frames": "many", "seed": -1}, "frames: .*; seed: "),
        ({"runtime": "fast"}, "runtime: .*'cuda_graph'.*not 'fast'"),
        ({"size": "32x"}, "size: write pixels of the shorter side, .*768x432, not '32x'"),
        ({"max_memory": "8"}, "max_memory: .*such as 8GB or 512MiB, not '8'"),
        ({"max_memory": "lots"}, "such as 8GB"),
        ({"max_memory": "0GB"}, "such as 8GB"),
        ({"max_memory": "-1GB"}, "such as 8GB"),
    ],
)
def test_wrong_values_are_named(given, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(given)
    assert "\n" not in str(caught.value)


def test_sizes_in_bytes():
    sizes = {"8GB": 8 * 10**9, "512MiB": 2**29, "1.5 gb": 1_500_000_000, "3KiB": 3072}
    assert {text: parse_bytes(text) for text in sizes} == sizes


def test_every_runtime_can_be_named():
    assert [resolve({"runtime": name}).runtime for name in BACKENDS] == list(BACKENDS)
    assert resolve({}).runtime == "eager"
