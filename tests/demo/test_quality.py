"""The demo and the quality benchmark: what is measured, kept, compared and said."""

import json
import shutil
from types import SimpleNamespace

import pytest

pytest.importorskip("av")
pytest.importorskip("diffusers")
pytest.importorskip("pydantic")
pytest.importorskip("rich")

import numpy as np
import torch
from rich.console import Console

from tvkernels.benchmarks.edits import quality
from tvkernels.config import ConfigError
from tvkernels.demo import MODEL_DIR, measure, run
from tvkernels.demo.settings import OVERRIDES
from tvkernels.demo.world import edit_pair
from tvkernels.pipelines import METHODS
from tvkernels.recipes import ABLATIONS
from tvkernels.video import read_video

QUICK = {"steps": 1, "tune_steps": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A copy: the checkout's may be retrained beside us."""
    return shutil.copytree(MODEL_DIR, tmp_path_factory.mktemp("quality") / "model")


@pytest.fixture
def benchmark_run(model, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "MODEL_DIR", model)

    def go(scenes, methods, **options):
        return quality.run(scenes, methods, output=tmp_path / "q.jsonl", numbers=QUICK, **options)

    return go


class Fake:
    """A pipeline that gives the frames it was told to, in [0, 1]."""

    device = torch.device("cpu")

    def __init__(self, frames: np.ndarray):
        self.pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
        self.calls = []

    def set_progress_bar_config(self, **options):
        pass

    def fit(self, video, prompt, *, num_steps, learning_rate, generator, cache):
        self.calls.append(("fit", len(video), prompt, num_steps, learning_rate))

    def invert(self, video, *, num_inference_steps):
        self.calls.append(("invert", len(video), num_inference_steps))

    def __call__(self, prompt, *, num_inference_steps, guidance_scale, output_type):
        self.calls.append(("edit", prompt, num_inference_steps, guidance_scale))
        return SimpleNamespace(frames=self.pixels[None])


NUMBERS = SimpleNamespace(tune_steps=3, learning_rate=0.1, steps=5, guidance=2.0)


def test_the_truth_scores_full_marks_and_the_source_none():
    source, target = edit_pair(2)
    clip, truth = source.render().frames, target.render().frames
    pipe = Fake(truth)
    perfect = measure.edit_scene(pipe, NUMBERS, source, target)
    assert pipe.calls == [
        ("fit", 8, source.caption, 3, 0.1),
        ("invert", 8, 5),
        ("edit", target.caption, 5, 2.0),
    ]
    np.testing.assert_array_equal(perfect.frames, truth)
    assert perfect.measures["accuracy"] == 1
    assert perfect.measures["psnr"] > 60
    unchanged = measure.edit_scene(Fake(clip), NUMBERS, source, target).measures
    assert unchanged["accuracy"] == 0
    shuffled = measure.edit_scene(Fake(truth[[0, 5, 1, 7, 2, 6, 3, 4]]), NUMBERS, source, target)
    assert shuffled.measures["temporal"] > 2 * perfect.measures["temporal"]


def test_the_peak_is_of_this_run_alone():
    big = np.ones(25_000_000)
    del big
    memory = measure.PeakMemory(torch.device("cpu"))
    if not memory.fresh:
        pytest.skip("this system keeps no peak that can be set back")
    before = memory.peak_mib()
    held = np.ones(12_500_000)
    grown = memory.peak_mib() - before
    del held
    assert 80 < grown < 120


def test_rows_are_kept_and_resumed(benchmark_run, tmp_path, monkeypatch):
    rows = benchmark_run([0, 1], ["frame-by-frame"])
    path = tmp_path / "q.jsonl"
    assert quality.read_rows(path) == rows
    assert [row["scene"] for row in rows] == [0, 1]
    row = rows[0]
    assert row["settings"]["steps"] == 1
    assert row["settings"]["tune_steps"] == 0, "a method that tunes nothing"
    assert set(row["measures"]) == set(quality.MEASURES)
    assert {"recipe", "versions", "commit", "date", "device"} <= row.keys()
    measured = measure.Edited(None, dict.fromkeys(quality.MEASURES, 0.0))
    monkeypatch.setattr(quality, "edit_scene", lambda *args, **options: measured)
    again = benchmark_run([1, 2], ["frame-by-frame"], resume=True)
    assert again[0] == rows[1]
    assert again[1]["scene"] == 2
    assert len(quality.read_rows(path)) == 3
    benchmark_run([1], ["frame-by-frame"], seed=1, resume=True)
    assert len(quality.read_rows(path)) == 4, "another seed is another row"


def test_variants_of_the_edit_alone_share_what_fit_made(benchmark_run, monkeypatch):
    made = []

    def measured(pipe, numbers, source, target, *, seed, masked, cache):
        made.append((pipe.settings.propagation, pipe.settings.aggregation, cache))
        return measure.Edited(None, dict.fromkeys(quality.MEASURES, 0.0))

    monkeypatch.setattr(quality, "edit_scene", measured)
    benchmark_run([0], ["stable-video"], ablation=True)
    ways = [("atlas", "network"), *((w, "network") for w in ("sequential", "random", "fixed"))]
    assert [each[:2] for each in made] == [*ways, ("atlas", "median")]
    assert made[0][2] is None, "the method's own time is measured"
    assert len({each[2].folder for each in made[1:]}) == 1


def test_a_variant_runs_with_its_own_recipe(benchmark_run, monkeypatch):
    monkeypatch.setattr(quality, "ABLATIONS", {"ei2-r4": ABLATIONS["ei2-r4"]})
    own, varied = benchmark_run([0], ["ei2"], ablation=True)
    assert [own["method"], varied["method"]] == ["ei2", "ei2-r4"]
    assert "others=2" in own["recipe"] and "others=4" in varied["recipe"]


def test_who_takes_part():
    assert [entrant.name for entrant in quality.entrants(None, False)] == list(METHODS)
    varied = {entrant.name: entrant for entrant in quality.entrants(None, True)}
    others = [entrant.name for entrants in quality.VARIED.values() for entrant in entrants]
    bases = {"tav": "tune-a-video", "ei2": "ei2", "tcv": "tcve"}
    methods = {*bases.values(), *quality.VARIED}
    assert set(varied) == methods | set(ABLATIONS) | set(others)
    assert list(varied)[: len(methods)] == [name for name in METHODS if name in methods]
    assert all(varied[name].method == bases[name[:3]] for name in ABLATIONS)
    own = [name for name in ABLATIONS if name.startswith("ei2")]
    assert [entrant.name for entrant in quality.entrants(["ei2"], True)] == ["ei2", *own]
    with pytest.raises(ConfigError, match="unknown method 'x'"):
        quality.entrants(["x"], False)


def test_a_file_that_holds_no_rows_is_named(tmp_path):
    path = tmp_path / "q.jsonl"
    assert quality.read_rows(path) == []
    path.write_text('{"scene": 1}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"q.jsonl, line 1"):
        quality.read_rows(path)


def test_intervals_cover_the_mean_19_times_in_20():
    rng = np.random.default_rng(1)
    intervals = [quality.interval(rng.normal(3, 2, 30), resamples=500) for _ in range(300)]
    covered = np.mean([low <= 3 <= high for _, low, high in intervals])
    assert 0.89 <= covered <= 0.98
    assert quality.interval([2.0]) == (2.0, 2.0, 2.0)
    mean, low, high = quality.interval([1, 2, 3, 4])
    assert (mean, quality.interval([1, 2, 3, 4])) == (2.5, (mean, low, high))


def row(method: str, scene: int, **measures) -> dict:
    filled = {**dict.fromkeys(quality.MEASURES, 0.5), **measures}
    return {"method": method, "scene": scene, "settings": {}, "measures": filled}


def test_differences_are_paired_by_scene():
    rows = [row("ei2", s, psnr=10.0 * s + 1) for s in (0, 1, 2)]
    rows += [row("tune-a-video", s, psnr=10.0 * s) for s in (2, 1, 3)]
    assert quality.differences(rows, "ei2", "tune-a-video", "psnr") == [1.0, 1.0]
    console = Console(record=True, width=160)
    quality.show(rows, console)
    shown = console.export_text()
    assert "ei2 - tune-a-video" in shown
    assert "+1.0" in shown
    assert "frame-by-frame" not in shown


def test_what_was_not_measured_is_called_that():
    console = Console(record=True, width=200)
    quality.show([row("ei2", 0, peak_mib=None)], console)
    assert "not measured" in console.export_text()


def means(**accuracy) -> dict:
    return {
        name: {"accuracy": accuracy[name.replace("-", "_")], "psnr": 20.0, "temporal": temporal}
        for name, temporal in zip(run.QUICK, (0.05, 0.06, 0.04), strict=True)
    }


def test_the_demo_says_who_loses():
    said = run.sentences(means(frame_by_frame=0.9, tune_a_video=0.8, ei2=0.7))
    assert said[0] == "target accuracy: ei2 LOSES to tune-a-video, 70 % against 80 %"
    assert "background PSNR: ei2 ties with tune-a-video, 20.0 dB against 20.0 dB" in said
    assert "temporal error: tune-a-video LOSES to frame-by-frame, 0.0600 against 0.0500" in said
    assert "temporal error: ei2 beats frame-by-frame, 0.0400 against 0.0500" in said
    assert "target accuracy: ei2 LOSES to frame-by-frame, 70 % against 90 %" in said
    said = run.sentences(means(frame_by_frame=0.5, tune_a_video=0.6, ei2=0.7))
    assert said[0] == "target accuracy: ei2 beats tune-a-video, 70 % against 60 %"


def test_the_demo_writes_all_it_promises(model, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "MODEL_DIR", model)
    baseline, *tuned = run.QUICK
    for name in tuned:
        monkeypatch.setitem(OVERRIDES, name, QUICK)
    monkeypatch.setitem(OVERRIDES, baseline, {"steps": 1})
    console, lines = Console(record=True, width=160), []
    run.run(tmp_path / "demo", 1, console, lines.append)
    shown = console.export_text()
    assert all(column in shown for column in run.COLUMNS)
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    clips = {f"clip0-{what}.mp4" for what in ("source", "truth", *run.QUICK)}
    assert names == clips | {"contact_sheet.png", "report.json"}
    assert all(len(read_video(tmp_path / "demo" / clip)) == 8 for clip in clips)
    report = json.loads((tmp_path / "demo" / "report.json").read_text(encoding="utf-8"))
    assert list(report["methods"]) == list(run.QUICK)
    assert report["methods"]["ei2"]["settings"]["tune_steps"] == 1
    assert set(report["methods"]["ei2"]["mean"]) == set(quality.MEASURES)
    assert report["sentences"] == lines[-1 - len(report["sentences"]) : -1]
