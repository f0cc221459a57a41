"""`tvk`: whole edits, and one clear line for everything that can be wrong."""

import json
import shutil
from pathlib import Path

import pytest
from fresh import fresh, printed

pytest.importorskip("av")
pytest.importorskip("diffusers")
pytest.importorskip("pydantic")
pytest.importorskip("rich")
pytest.importorskip("typer")
pytest.importorskip("yaml")

import numpy as np
import torch

import tvkernels
from tvkernels.cli import app, main
from tvkernels.demo import MODEL_DIR
from tvkernels.demo.settings import OVERRIDES
from tvkernels.demo.world import edit_pair
from tvkernels.devices import ADVICE, pick_device
from tvkernels.pipelines.cache import Cache
from tvkernels.runtime.files import ArtifactError
from tvkernels.video import read_video, write_video

ROOT = Path(__file__).parents[1]
WORDS = ["--source-prompt", "a red circle", "--prompt", "a blue star"]
TINY = ["--frames", "2", "--dtype", "fp32", "--size", "32", "--steps", "2", "--tune-steps", "1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A clip, and a copy of the model, which the checkout's may be retrained beside us."""
    folder = tmp_path_factory.mktemp("cli")
    shutil.copytree(MODEL_DIR, folder / "model")
    scene, _ = edit_pair(0, num_frames=4)
    write_video(folder / "clip.mp4", scene.render(64, 64).frames, 8)
    write_video(folder / "one.mp4", scene.render(64, 64).frames[:1], 8)
    write_video(folder / "three.gif", scene.render(48, 48).frames[:3], 8)
    write_video(folder / "portrait.mp4", scene.render(96, 48).frames, 8)
    write_video(folder / "images", scene.render(48, 64).frames[:2], 8)
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    """Not beside the outputs: ONNX Runtime leaves a folder there when it is first imported."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def tvk(capsys):
    """Runs the command: status, standard output, standard error."""

    def run(*arguments) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        return (status, *capsys.readouterr())

    return run


@pytest.fixture
def edit(tvk, place, tmp_path):
    """A tiny edit of a clip; more options come last and win."""

    def run(*more, clip="clip.mp4", out="out.mp4", words=WORDS):
        model = () if "--model" in more else ("--model", place / "model")
        chosen = ("edit", place / clip, *words, *model, *TINY, "-o", tmp_path / out)
        return tvk(*chosen, "--cache", tmp_path / "cache", *more)

    return run


def record(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def one_line(text: str) -> str:
    assert text.startswith("tvk: ")
    assert text.count("\n") == 1, text
    assert "Traceback" not in text
    return text


def test_an_edit_is_recorded_and_can_be_repeated_from_its_record(edit, tvk, tmp_path, place):
    status, shown, complaints = edit()
    assert (status, complaints) == (0, "")
    assert "wrote" in shown
    assert len(read_video(tmp_path / "out.mp4")) == 2
    kept = record(tmp_path / "out.json")
    assert kept["settings"] == {
        "clip": str(place / "clip.mp4"), "method": "ei2", "model": str(place / "model"),
        "source_prompt": "a red circle", "prompts": ["a blue star"], "negative_prompt": "",
        "start": 0, "stride": 1, "frames": 2, "size": [32, 32], "crop": True, "tune_steps": 1,
        "learning_rate": 3e-5, "weight_decay": None, "steps": 2, "guidance": 7.5, "seed": 0,
        "clip_skip": None, "variant": None, "lora": None, "embedding": None, "audio": True,
        "device": str(pick_device()), "dtype": "fp32",
        "backend": "auto", "runtime": "eager", "gradient_checkpointing": False, "max_memory": None,
        "cache": str(tmp_path / "cache"),
        "output": str(tmp_path / "out.mp4"),
    }  # fmt: skip
    assert kept["versions"]["tvkernels"] == tvkernels.__version__
    assert {"python", "torch", "diffusers"} <= kept["versions"].keys()
    assert kept["cache"] == {"tuning": "miss", "inversion": "miss"}
    stages = {"load", "tuning", "inversion", "sampling", "decoding", "total"}
    assert stages == kept["seconds"].keys()
    assert kept["memory"] is None
    again = tvk("edit", "--config", tmp_path / "out.json", "--no-cache", "-o", tmp_path / "b.mp4")
    assert again[0] == 0
    assert (tmp_path / "b.mp4").read_bytes() == (tmp_path / "out.mp4").read_bytes()
    assert record(tmp_path / "b.json")["cache"] == {"tuning": "off", "inversion": "off"}
    assert edit("--seed", "1", out="c.mp4")[0] == 0
    assert (tmp_path / "c.mp4").read_bytes() != (tmp_path / "out.mp4").read_bytes()


def test_a_second_prompt_skips_the_preprocessing(edit, tmp_path, monkeypatch):
    assert edit()[0] == 0

    def tuned_again(*args):
        raise AssertionError("the clip was tuned again")

    monkeypatch.setattr("tvkernels.pipelines.one_shot.OneShotPipeline._tune", tuned_again)
    more = ("--prompt", "a green ring", "--guidance", "3", "--negative-prompt", "a star")
    status, shown, _ = edit(*more, words=WORDS[:2], out="second.gif")
    assert status == 0
    assert shown.count("taken from the cache") == 2
    kept = record(tmp_path / "second.json")
    assert kept["cache"] == {"tuning": "hit", "inversion": "hit"}
    assert kept["settings"]["prompts"] == ["a green ring"]


def test_a_budget_is_planned_for_and_recorded(edit, tmp_path):
    quick = ("--method", "frame-by-frame", "--tune-steps", "0", "--size", "64", "--steps", "1")
    status, _, complaints = edit(*quick, "--max-memory", "1MB")
    assert status == 2
    least = one_line(complaints).partition("edit: ")[2].split()[0]
    kept = {}
    for budget in ("1GB", least):
        status, shown, complaints = edit(*quick, "--max-memory", budget)
        assert (status, complaints) == (0, "")
        assert "accounted peak" in shown and f"of {budget}" in shown
        kept[budget] = record(tmp_path / "out.json")
        assert kept[budget]["settings"]["max_memory"] == budget
        kept[budget]["frames"] = read_video(tmp_path / "out.mp4").frames.astype(int)
    plans = [kept[budget]["memory"] for budget in kept]
    chosen = [(told["chunk"], told["split_guidance"]) for told in plans]
    assert chosen[0] == (2, False) != chosen[1]
    assert plans[1]["peak"] <= plans[1]["budget"] < plans[0]["peak"]
    assert abs(kept["1GB"]["frames"] - kept[least]["frames"]).mean() < 1


def test_a_corrupted_cache_entry_is_computed_again_and_said(edit, tmp_path):
    assert edit()[0] == 0
    before = (tmp_path / "out.mp4").read_bytes()
    entries = sorted((tmp_path / "cache").glob("*.safetensors"))
    assert len(entries) == 2
    for entry in entries:
        data = bytearray(entry.read_bytes())
        data[-1] ^= 1
        entry.write_bytes(data)
    status, _, complaints = edit()
    assert status == 0
    assert complaints.count("tvk: warning: ") == complaints.count("computing it again") == 2
    assert record(tmp_path / "out.json")["cache"] == {"tuning": "miss", "inversion": "miss"}
    assert (tmp_path / "out.mp4").read_bytes() == before
    assert all(Cache(tmp_path / "cache").load(entry.stem) for entry in entries)


def test_a_cache_that_cannot_be_written_costs_nothing_but_itself(edit, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tvkernels.pipelines.cache.save_file", full)
    status, _, complaints = edit()
    assert status == 0
    assert complaints.count("cannot be kept") == 2
    assert not any((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("clip", "frames", "size"),
    [
        ("three.gif", 3, (32, 32)),
        ("one.mp4", 1, (32, 32)),
        ("portrait.mp4", 4, (64, 32)),
        ("images", 2, (32, 40)),
    ],
)
def test_odd_clips_pass_whole(tvk, place, tmp_path, clip, frames, size):
    """Without --frames: all there are."""
    options = ["--model", place / "model", "--no-cache", *TINY[2:], "-o", tmp_path / "out.mp4"]
    status, shown, complaints = tvk("edit", place / clip, *WORDS, *options)
    assert (status, complaints) == (0, "")
    assert read_video(tmp_path / "out.mp4").frames.shape == (frames, *size, 3)
    assert f"{frames} frames of {size[1]} x {size[0]}" in shown


@pytest.mark.parametrize("name", ["man-skiing", "surfer-on-wave", "wolf"])
def test_real_clips_pass_whole(edit, clips, tmp_path, name):
    status, _, complaints = edit("--stride", "4", clip=clips / f"{name}.mp4")
    assert (status, complaints) == (0, "")
    assert len(read_video(tmp_path / "out.mp4")) == 2


def test_the_embedded_model_brings_its_own_numbers_and_says_so(edit, tmp_path):
    status, shown, _ = edit("--model", "embedded")
    assert status == 0
    own = OVERRIDES["ei2"]["learning_rate"]
    assert f"learning_rate {own:g} (3e-05)" in shown
    assert "tune_steps" not in shown, "what was asked for is nobody's default"
    assert record(tmp_path / "out.json")["settings"]["learning_rate"] == own


def test_a_tune_a_video_file_makes_a_clip_for_each_prompt(tvk, place, tmp_path):
    config = tmp_path / "tav.yaml"
    config.write_text(
        f"""
pretrained_model_path: {place / "model"}
output_dir: {tmp_path / "out"}
train_data: {{video_path: {place / "clip.mp4"}, prompt: a red circle, n_sample_frames: 4,
              width: 40, height: 32, sample_start_idx: 0, sample_frame_rate: 1}}
validation_data: {{prompts: [A blue star!, a ring], video_length: 4, num_inference_steps: 1,
                   guidance_scale: 12.5, use_inv_latent: True, num_inv_steps: 1}}
learning_rate: 3e-5
max_train_steps: 1
mixed_precision: fp16
""",
        encoding="utf-8",
    )
    status, shown, _ = tvk("edit", "--config", config, "--no-cache", "--seed", "7")
    assert status == 0
    assert "mixed_precision has no effect" in shown
    clips = sorted((tmp_path / "out").glob("*.mp4"))
    assert [clip.name for clip in clips] == ["a-blue-star.mp4", "a-ring.mp4"]
    assert read_video(clips[0]).frames.shape == (4, 32, 40, 3)
    kept = record(tmp_path / "out" / "a-ring.json")["settings"]
    assert (kept["method"], kept["seed"], kept["prompts"]) == ("tune-a-video", 7, ["a ring"])


# name -> (options after a good command line, or `edit CLIP` before its options, or a whole line;
# what the complaint must say).
BAD = {
    "missing file": ("edit {tmp}/gone.mp4", "gone.mp4 does not exist"),
    "not a video": ("edit {tmp}/text.mp4", "not a video"),
    "no ending of a video": ("edit {tmp}/notes.txt", "not a clip"),
    "zero length": ("edit {tmp}/empty.mp4", "is empty"),
    "no images": ("edit {tmp}/nounet", "holds no frames"),
    "too many frames": ("--frames 5", "ask for at most 4"),
    "start after the end": ("--start 9", "start must be under 4"),
    "unreachable size": ("--size 50x64", "the nearest is 48x64"),
    "size of a runtime": ("--size 72x64 --runtime onnx", "not 72x64: ask for --size 64x64"),
    "negative size": ("--size -8", "size: "),
    "unknown method": ("--method ei3", "use one of ei2, tune-a-video"),
    "tuning nothing": ("--method frame-by-frame --tune-steps 2", "leave out --tune-steps"),
    "unknown backend": ("--backend cudnn", "'triton'"),
    "unknown runtime": ("--runtime fast", "'cuda_graph'"),
    "no size in bytes": ("--max-memory 8", "such as 8GB"),
    "too little memory": (
        "--max-memory 20MB --method frame-by-frame --size 32",
        "would do, of which",
    ),
    "no such model": ("--model {tmp}/gone", "is no folder, no .safetensors file"),
    "no model": ("--model {tmp}/noindex", "model_index.json"),
    "no unet": ("--model {tmp}/nounet", "no unet/config.json"),
    "sdxl": ("--model {tmp}/sdxl", "SDXL"),
    "video unet": ("--model {tmp}/video", "UNet3DConditionModel"),
    "inpainting": ("--model {tmp}/inpaint", "9 channels"),
    "no weights": ("--model {tmp}/weightless", "no diffusion_pytorch_model.safetensors"),
    "broken weights": ("--model {tmp}/broken", "cannot load the model"),
    "output in a file": ("-o {place}/clip.mp4/out.mp4", "is a file, not a folder"),
    "output of no kind": ("-o {tmp}/OUT/out.doc", "ending must be one of"),
    "output is the source": ("-o {place}/clip.mp4", "it is the source"),
    "output folder in use": ("-o {place}/images", "not an empty folder"),
    "gif too fast": (
        "edit {tmp}/fast.mp4 --prompt x --source-prompt x -o {tmp}/OUT/o.gif",
        "at most 50 frames a second, not 60",
    ),
    "cache in a file": ("--cache {place}/clip.mp4", "is a file, not a folder"),
    "two caches": ("--cache {tmp} --no-cache", "either --cache or"),
    "bad yaml": ("--config {tmp}/bad.yaml", "not valid YAML"),
    "unknown key": ("--config {tmp}/typo.yaml", "unknown keys: methd"),
    "no yaml": ("--config {tmp}/gone.yaml", "cannot read"),
    "no prompt": ("edit {place}/clip.mp4 --source-prompt x -o {tmp}/o.mp4", "--prompt is missing"),
    "no source prompt": ("edit {place}/clip.mp4 --prompt x -o {tmp}/o.mp4", "--source-prompt is"),
    "no output": ("edit {place}/clip.mp4 --prompt x --source-prompt x", "--output is missing"),
    "no clip": ("edit --prompt x --source-prompt x -o {tmp}/o.mp4", "CLIP is missing"),
    "no number": ("--steps many", "Invalid value for '--steps'"),
    "unknown option": ("--stepz 3", "No such option: --stepz"),
    "unknown command": ("edti {place}/clip.mp4", "No such command 'edti'"),
    "unknown method to measure": (
        "bench quality --method ei3 -o {tmp}/o.jsonl",
        "use one of ei2",
    ),
    "unknown dtype to measure": ("bench quality --dtype fp8 -o {tmp}/o.jsonl", "use one of fp32"),
    "results of no kind": ("bench quality -o {tmp}/o.mp4", ".jsonl"),
    "demo into a file": ("demo -o {place}/clip.mp4", "is a file, not a folder"),
}
UNETS = {
    "nounet": None,
    "sdxl": {"addition_embed_type": "text_time"},
    "video": {"_class_name": "UNet3DConditionModel"},
    "inpaint": {"in_channels": 9},
}


@pytest.fixture
def wrong(place, tmp_path):
    """The things that `BAD` names."""
    (tmp_path / "text.mp4").write_text("not a video", encoding="utf-8")
    (tmp_path / "empty.mp4").touch()
    write_video(tmp_path / "fast.mp4", np.zeros((2, 16, 16, 3), np.uint8), 60)
    (tmp_path / "notes.txt").write_text("words", encoding="utf-8")
    (tmp_path / "bad.yaml").write_text("a: [1, 2", encoding="utf-8")
    (tmp_path / "typo.yaml").write_text("methd: ei2", encoding="utf-8")
    (tmp_path / "noindex").mkdir()
    for name, config in UNETS.items():
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "model_index.json").write_text("{}", encoding="utf-8")
        if config is not None:
            (tmp_path / name / "unet" / "config.json").write_text(
                json.dumps(config), encoding="utf-8"
            )
    names = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(place / "model", tmp_path / "weightless", ignore=names)
    shutil.copytree(place / "model", tmp_path / "broken")
    (tmp_path / "broken" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"oops")


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line_and_leaves_nothing(name, wrong, tvk, tmp_path, place):
    line, message = BAD[name]
    arguments = line.format(tmp=tmp_path, place=place).split()
    good = [*WORDS, "-o", tmp_path / "OUT" / "out.mp4"]
    if arguments[0].startswith("-"):
        arguments = ["edit", place / "clip.mp4", *good, *arguments]
    elif len(arguments) == 2 and arguments[0] == "edit":
        arguments += good
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    source = (place / "clip.mp4").read_bytes()
    status, _, complaints = tvk(*arguments)
    assert status == 2
    assert message in one_line(complaints)
    after = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    assert after == before
    assert (place / "clip.mp4").read_bytes() == source


def test_a_full_disk_is_one_line_and_leaves_no_clip(edit, tmp_path, monkeypatch):
    def full(path, frames, fps):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(tvkernels.video._encode.ENCODERS, ".mp4", full)
    status, _, complaints = edit()
    assert status == 2
    assert "No space left on device" in one_line(complaints)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_what_a_runtime_refuses_is_one_line(edit, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ArtifactError("latents of 4 x 4: both sides are multiples of 8")

    monkeypatch.setattr("tvkernels.pipelines.one_shot.OneShotPipeline.invert", refuse)
    status, _, complaints = edit("--method", "frame-by-frame", "--tune-steps", "0")
    assert status == 2
    assert "the runtime eager: latents of 4 x 4" in one_line(complaints)
    assert not (tmp_path / "out.mp4").exists()


def test_a_defect_is_one_line_unless_debugged(edit, tvk, monkeypatch):
    def defect(*args):
        raise RuntimeError("boom")

    monkeypatch.setattr("tvkernels.edit.edit", defect)
    status, _, complaints = edit()
    assert status == 1
    assert "RuntimeError: boom" in one_line(complaints)
    with pytest.raises(RuntimeError, match="boom"):
        tvk("edit", "clip.mp4", "--debug")


ABSENT = """
import runpy, sys
_, package, *sys.argv[1:] = sys.argv
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
runpy.run_module("tvkernels", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("package", "extra"), [("typer", "'tvkernels[cli,"), ("diffusers", "'tvkernels[diffusers]'")]
)
def test_what_is_not_installed_is_named_with_its_extra(package, extra, place, tmp_path):
    arguments = ["edit", place / "clip.mp4", *WORDS, "-o", tmp_path / "out.mp4"]
    done = fresh(ABSENT, package, *arguments)
    assert done.returncode == 2
    line = one_line(done.stderr)
    assert f"{package} is not installed" in line and extra in line


def test_memory_that_is_not_there_is_no_defect(edit, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore.")

    monkeypatch.setattr("tvkernels.edit.edit", full)
    status, _, complaints = edit()
    assert status == 2
    assert "out of memory: CUDA out of memory. Tried to allocate 9 GiB: " in complaints
    assert ADVICE in one_line(complaints)


def test_cheap_mistakes_are_found_before_the_slow_imports():
    code = """
        import sys
        from tvkernels.cli import main

        words = ["--prompt", "x", "--source-prompt", "y", "-o", "out.mp4"]
        assert main(["edit", "gone.mp4", *words]) == 2
        assert main(["edit", "gone.mp4", "--method", "ei3", *words]) == 2
        assert main(["--help"]) == main(["edit", "--help"]) == 0
        assert not {"diffusers", "transformers", "av"} & set(sys.modules)
    """
    printed(code)


# A real signal to a real process, in the third step of its tuning.
INTERRUPTED = """
import os, signal, sys, torch
from tvkernels.cli import app, main
# A shell's background job, as CI may be one, starts with the signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
taken, step = [], torch.optim.AdamW.step
def counted(*args, **kwargs):
    taken.append(1)
    if len(taken) == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return step(*args, **kwargs)
torch.optim.AdamW.step = counted
status = main(sys.argv[1:])
assert len(taken) == 3, taken
sys.exit(status)
"""


def test_ctrl_c_while_tuning_leaves_the_cache_valid(edit, place, tmp_path):
    assert edit()[0] == 0
    entries = sorted((tmp_path / "cache").iterdir())
    arguments = [
        "edit", place / "clip.mp4", *WORDS, "--model", place / "model", *TINY,
        "--tune-steps", "100", "--cache", tmp_path / "cache", "-o", tmp_path / "late.mp4",
    ]  # fmt: skip
    done = fresh(INTERRUPTED, *arguments)
    assert done.returncode == 130, done.stderr
    assert "interrupted" in one_line(done.stderr)
    assert sorted((tmp_path / "cache").iterdir()) == entries
    assert not list(tmp_path.glob("*late*"))
    assert edit()[1].count("taken from the cache") == 2


def test_ctrl_c_while_sampling_keeps_what_was_finished(edit, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("tvkernels.edit.sample", interrupt)
    status, _, complaints = edit()
    assert status == 130
    one_line(complaints)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    monkeypatch.undo()
    assert edit()[1].count("taken from the cache") == 2


def test_the_small_commands(tvk):
    assert tvk("--version") == (0, f"tvk {tvkernels.__version__}\n", "")
    status, shown, _ = tvk("methods")
    assert status == 0
    assert all(name in shown for name in ("ei2", "tune-a-video", "frame-by-frame"))
    status, shown, _ = tvk("info")
    assert status == 0
    assert "frame_attention" in shown
    status, shown, _ = tvk("info", "--json")
    assert json.loads(shown)["versions"]["tvkernels"] == tvkernels.__version__
    status, shown, complaints = tvk()
    assert (status, complaints) == (2, "")
    assert "edit" in shown


def test_no_help_text_is_swallowed():
    """What stands in square brackets is markup to rich, and is not shown."""
    import typer

    def options(command, name):
        for sub in getattr(command, "commands", {}).values():
            yield from options(sub, f"{name} {sub.name}")
        yield from ((f"{name} {option.name}", option.help or "") for option in command.params)

    found = list(options(typer.main.get_command(app), "tvk"))
    assert len(found) > 80
    assert [name for name, text in found if "[" in text] == []


def test_nothing_that_was_given_is_written_over(edit, place, tmp_path):
    clip = place / "clip.mp4"
    shutil.copy(clip, tmp_path / "source.mp4")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "source.mp4")
    for given, out in (
        ("link.mp4", "source.mp4"),
        ("source.mp4", "../" + tmp_path.name + "/source.mp4"),
    ):
        status, _, complaints = edit(clip=tmp_path / given, out=out)
        assert status == 2 and "it is the source clip" in one_line(complaints)
    assert (tmp_path / "source.mp4").read_bytes() == clip.read_bytes()
    (tmp_path / "mine.json").write_text('{"mine": 1}', encoding="utf-8")
    status, _, complaints = edit(out="mine.mp4")
    assert status == 2 and "a file that is none is there" in one_line(complaints)
    assert (tmp_path / "mine.json").read_text(encoding="utf-8") == '{"mine": 1}'
