"""The learned metrics: formulas against loops, small random networks, and every refusal."""

import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fresh import printed

np = pytest.importorskip("numpy")
cv2 = pytest.importorskip("cv2")
transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")
typer = pytest.importorskip("typer")

from tiny_metric_models import (  # noqa: E402
    MEAN,
    SHARED,
    SIDE,
    STD,
    clone_v2vbench,
    save_models,
)
from torch import nn  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from tvkernels.benchmarks.metrics_command import metrics_command  # noqa: E402
from tvkernels.video import VideoError, write_video  # noqa: E402
from tvkernels.video import metrics as learned  # noqa: E402
from tvkernels.video.metrics import METRICS, ROLES, MetricError, Models, measure  # noqa: E402

PROMPTS = {"prompt": "a blue star", "source_prompt": "a red circle"}
V2VBENCH = (
    "frames-quality", "video-quality", "semantic-consistency", "object-consistency",
    "frames-text-alignment", "frames-pick-score", "video-text-alignment", "motion-alignment",
)  # fmt: skip


def cosine(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))


def panning(frames: int, height: int, width: int, seed: int, step: int = 1):
    """A smooth random picture, moving `step` pixels to the left in each frame."""
    picture = np.random.default_rng(seed).integers(0, 256, (height, width + 64, 3), dtype=np.uint8)
    picture = cv2.normalize(cv2.GaussianBlur(picture, (0, 0), 3), None, 0, 255, cv2.NORM_MINMAX)
    return np.stack([picture[:, f * step : f * step + width] for f in range(frames)])


@pytest.fixture(scope="module")
def edit():
    return panning(9, 40, 56, seed=0)


@pytest.fixture(scope="module")
def source():
    return panning(9, 40, 56, seed=1, step=2)


def prepared(frame, shortest: int) -> torch.Tensor:
    """A frame as `preparation` says, by Pillow: float32 [1, 3, SIDE, SIDE]."""
    h, w = frame.shape[:2]
    size = [int(side * shortest / min(h, w)) for side in (w, h)]
    picture = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))
    top, left = ((side - SIDE) // 2 for side in picture.shape[:2])
    picture = picture[top : top + SIDE, left : left + SIDE] / 255
    return torch.tensor((picture - MEAN) / STD).float().permute(2, 0, 1)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_models(root)
    return root


@pytest.fixture(scope="module")
def models(folders):
    roles = {role: folders / role for role in ("clip", "pickscore", "dino")}
    return Models(roles | {"aesthetic": folders / "head.pth"})


@pytest.fixture
def without(monkeypatch):
    """Makes a package one that is not installed."""
    return lambda name: monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def third_party(monkeypatch, tmp_path):
    return clone_v2vbench(monkeypatch, tmp_path)


def test_the_table_names_what_there_is():
    assert tuple(METRICS)[:8] == V2VBENCH
    assert {role for metric in METRICS.values() for role in metric.models} == set(ROLES)
    assert {item for metric in METRICS.values() for item in metric.needs} == set(learned.NEEDS)
    published = {role: ROLES[role].default for role in ("clip", "dino", "pickscore", "aesthetic")}
    assert published == {
        "clip": "openai/clip-vit-large-patch14",
        "dino": "facebook/dinov2-base",
        "pickscore": "yuvalkirstain/PickScore_v1",
        "aesthetic": "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE",
    }
    assert [name for name in METRICS if not METRICS[name].higher] == [
        "lpips-p", "lpips-t", "flow-distance",
    ]  # fmt: skip


def test_formulas_are_those_of_loops():
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(3))
    steps = [cosine(a, b) for a, b in itertools.pairwise(features)]
    assert min(steps) < 0 < max(steps)
    assert learned.consecutive_cosine(features) == pytest.approx(np.mean(steps), abs=1e-6)
    floored = np.mean([max(0, step) for step in steps])
    assert learned.consecutive_cosine(features, least=0) == pytest.approx(floored, abs=1e-6)
    pairs = [cosine(a, b) for a, b in itertools.combinations(features, 2)]
    assert learned.pairwise_cosine(features) == pytest.approx(np.mean(pairs), abs=1e-6)
    target, source = features[0] + 0.1, features[1] - 0.1
    near = [cosine(frame, target) for frame in features]
    far = [cosine(frame, source) for frame in features]
    assert learned.text_cosine(features, target) == pytest.approx(np.mean(near), abs=1e-6)
    share = sum(a > b for a, b in zip(near, far, strict=True)) / len(features)
    assert 0 < share < 1
    assert learned.frame_wise_accuracy(features, target, source) == pytest.approx(share)
    one, other = torch.randn(2, 3, 4, 5, 2)
    lengths = [math.hypot(*d) for d in (one - other).reshape(-1, 2).tolist()]
    assert learned.end_point_error(one, other) == pytest.approx(np.mean(lengths), rel=1e-5)


def test_dover_fuses_by_the_published_numbers():
    # At the means of its data both parts are 0; one deviation up adds a part's own weight.
    assert learned.dover_score(0.1107, -0.08285) == pytest.approx(0.5)
    up = 1 / (1 + math.exp(-0.6104))
    assert learned.dover_score(0.1107 + 0.07355, -0.08285) == pytest.approx(up)
    up = 1 / (1 + math.exp(-0.3896))
    assert learned.dover_score(0.1107, -0.08285 + 0.03774) == pytest.approx(up)


def test_clip_metrics_are_those_of_the_model_asked_by_itself(folders, models, edit):
    tower = transformers.CLIPVisionModel.from_pretrained(folders / "clip").eval()
    net = transformers.CLIPModel.from_pretrained(folders / "clip").eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folders / "clip")
    tokens = tokenizer(list(PROMPTS.values()), padding=True, return_tensors="pt")
    with torch.no_grad():
        pixels = [prepared(frame, SIDE) for frame in edit]
        pooled = [tower(pixel_values=x).pooler_output[0] for x in pixels]
        logits = np.array([net(**tokens, pixel_values=x).logits_per_image[0] for x in pixels])
        embeddings = [net(**tokens, pixel_values=x).image_embeds[0] for x in pixels]
    expected = {
        "semantic-consistency": np.mean(
            [max(0, cosine(a, b)) for a, b in itertools.pairwise(pooled)]
        ),
        "temporal-consistency": np.mean([cosine(a, b) for a, b in itertools.pairwise(embeddings)]),
        "frame-consistency": np.mean(
            [cosine(a, b) for a, b in itertools.combinations(embeddings, 2)]
        ),
        "frames-text-alignment": logits[:, 0].mean(),
        "frame-wise-accuracy": np.mean(logits[:, 0] > logits[:, 1]),
    }
    found = measure(expected, edit, **PROMPTS, models=models)
    assert found == pytest.approx(expected, abs=1e-4)
    head = torch.load(folders / "head.pth")
    grades = []
    for x in embeddings:
        x = x / x.norm()
        for n in (0, 2, 3):
            x = head[f"layers.{n}.weight"] @ x + head[f"layers.{n}.bias"]
        grades.append(x.item())
    grade = measure(["frames-quality"], edit, models=models)["frames-quality"]
    assert grade == pytest.approx(np.mean(grades), abs=1e-5)
    whole = Models({"clip": models["clip"], "aesthetic": folders / "predictor"})
    assert measure(["frames-quality"], edit, models=whole)["frames-quality"] == grade


def test_dino_and_pickscore_are_those_of_the_models_asked_by_themselves(folders, models, edit):
    dino = transformers.Dinov2Model.from_pretrained(folders / "dino").eval()
    pick = transformers.CLIPModel.from_pretrained(folders / "pickscore").eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folders / "pickscore")
    tokens = tokenizer([PROMPTS["prompt"]], return_tensors="pt")
    with torch.no_grad():
        seen = [dino(pixel_values=prepared(x, 32)).pooler_output[0] for x in edit]
        liked = [pick(**tokens, pixel_values=prepared(x, SIDE)).logits_per_image for x in edit]
    expected = {
        "object-consistency": np.mean([max(0, cosine(a, b)) for a, b in itertools.pairwise(seen)]),
        "frames-pick-score": np.mean(liked),
    }
    assert measure(expected, edit, **PROMPTS, models=models) == pytest.approx(expected, abs=1e-4)


def test_a_clip_passes_once_through_a_network(models, edit):
    passes = []

    class Counted:
        scale, text = models["clip"].scale, staticmethod(models["clip"].text)

        def images(self, frames):
            passes.append(len(frames))
            return models["clip"].images(frames)

    asked = [name for name, metric in METRICS.items() if "clip" in metric.models]
    shared = Models({"clip": Counted(), "aesthetic": models["aesthetic"]})
    assert len(measure(asked, edit, **PROMPTS, models=shared)) == 6
    assert passes == [len(edit)]


def test_networks_of_other_packages_may_be_given(edit, source):
    picked = []

    def viclip(frames, prompt):
        picked.append(frames)
        return torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])

    given = Models({
        "dover": lambda frames: (0.1107, -0.08285),
        "viclip": viclip,
        "gmflow": lambda frames: torch.full((8, 4, 4, 2), float(frames[0, 0, 0, 0])),
        "lpips": lambda a, b: (a - b).abs().mean((1, 2, 3), keepdim=True),
    })  # fmt: skip
    clip = np.concatenate([edit, edit, edit[:6]])
    asked = ["video-quality", "video-text-alignment"]
    assert list(measure(asked, clip, prompt="x", models=given).values()) == pytest.approx(
        [0.5, 0.6]
    )
    assert np.array_equal(picked[0], clip[::3])
    found = measure(["motion-alignment", "lpips-p", "lpips-t"], edit, source=source, models=given)
    apart = abs(int(edit[0, 0, 0, 0]) - int(source[0, 0, 0, 0]))
    levels = edit.astype(float)
    assert found == pytest.approx({
        "motion-alignment": -apart * math.sqrt(2),
        "lpips-p": np.abs(levels - source).mean() / 127.5,
        "lpips-t": np.abs(levels[1:] - levels[:-1]).mean() / 127.5,
    })  # fmt: skip


def test_flow_metrics_are_opencvs_end_point_errors():
    edit, source = panning(3, 96, 128, seed=0), panning(3, 96, 128, seed=0, step=3)

    def flow(frames, compute):
        gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
        return np.stack([compute(a, b).copy() for a, b in itertools.pairwise(gray)])

    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    farneback = lambda a, b: cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 15, 3, 5, 1.2, 0)  # noqa: E731
    found = measure(["motion-alignment-dis", "flow-distance"], edit, source=source)
    for name, sign, compute in (
        ("motion-alignment-dis", -1, lambda a, b: dis.calc(a, b, None)),
        ("flow-distance", 1, farneback),
    ):
        apart = np.linalg.norm(flow(edit, compute) - flow(source, compute), axis=-1).mean()
        assert found[name] == pytest.approx(sign * apart, rel=1e-5)
        # The clips move the same way, by one and by three pixels a frame.
        assert abs(found[name]) == pytest.approx(2, abs=0.3)
    same = measure(["motion-alignment-dis", "flow-distance"], edit, source=edit)
    assert list(same.values()) == [0, 0]


def test_dover_is_asked_as_v2vbench_asks_it(third_party, edit):
    torch.manual_seed(5)
    np.random.seed(5)
    found = [Models()["dover"](edit) for _ in range(2)]
    after = torch.rand(1).item(), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    assert after == (torch.rand(1).item(), np.random.rand()), "the caller's draws are his own"
    torch.manual_seed(0)
    np.random.seed(0)
    drawn = torch.rand(1).item() + np.random.rand()
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    technical = ((edit[:3] + drawn - mean) / std).mean() / 4
    aesthetic = ((edit[:5] - mean) / std).mean() / 4
    assert found[0] == found[1] == pytest.approx((technical, aesthetic), rel=1e-4)


def test_gmflow_is_padded_and_cut_back(third_party, edit):
    flow = Models()["gmflow"](edit)
    expected = 2.0 * np.stack([edit[:-1, ..., 0], edit[1:, ..., 1]], -1)
    assert np.array_equal(flow.numpy(), expected)


def test_viclip_sees_the_frames_together(third_party, edit):
    video, text = Models()["viclip"](edit[:8], "four")
    assert video.tolist() == pytest.approx(2 * edit[:8].mean((1, 2, 3)), rel=1e-5)
    assert text.tolist() == [4] * 8


def ask(role, name=None):
    return lambda: Models({role: name})[role]


def refused(call, *words, error=MetricError) -> None:
    """One line with these words."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message


@pytest.mark.parametrize(
    ("names", "given", "words"),
    [
        (["sharpness"], {}, ("'sharpness'", "frames-quality")),
        (["frames-text-alignment"], {}, ("frames-text-alignment needs the edit's prompt",)),
        (["frame-wise-accuracy"], {"prompt": "x"}, ("needs the source's prompt",)),
        (["motion-alignment"], {}, ("needs the source clip",)),
        (["lpips-p", "nothing"], {"source": True}, ("'nothing'",)),
    ],
)
def test_what_is_missing_is_told_before_a_network_is_loaded(names, given, words, edit):
    if "source" in given:
        given = given | {"source": edit}
    models = Models({"clip": "./none"})
    refused(
        lambda: measure(["semantic-consistency", *names], edit, **given, models=models), *words
    )


def test_clips_that_do_not_fit_are_refused(edit, source):
    refused(lambda: measure([], edit, source=source[:5]), "9 frames", "source 5")
    refused(lambda: measure([], edit, source=source[:, :32]), "56 x 40", "56 x 32")
    refused(lambda: measure([], edit / 255), "uint8", error=VideoError)
    refused(lambda: measure(["temporal-consistency"], edit[:1]), "2 frames at least", "has 1")
    refused(lambda: measure(["video-text-alignment"], edit[:7], prompt="x"), "8 frames", "has 7")
    small = {"source": source[:, :, :12]}
    refused(lambda: measure(["flow-distance"], edit[:, :, :12], **small), "16 pixels")


def test_models_that_are_not_there_or_others_are_refused(folders, tmp_path, models, edit):
    refused(lambda: Models({"clop": "x"}), "'clop'", "dino")
    refused(lambda: Models(device="abacus"), "no device 'abacus'")
    refused(ask("clip", tmp_path / "none"), "there is no folder", tmp_path / "none")
    refused(ask("clip", "some/model"), "hf download some/model", "give clip a folder")
    refused(ask("dino", folders / "clip"), "kind clip, not dinov2")
    refused(ask("clip", tmp_path), "cannot be loaded from", tmp_path)
    refused(ask("dino", "some/model"), "hf download some/model", "give dino a folder")
    refused(ask("pickscore", "some/model"), "hf download some/model", "give pickscore a folder")
    refused(ask("aesthetic", "some/model"), "hf download some/model", "improved-aesthetic")
    (tmp_path / "head.pth").write_bytes(b"no checkpoint")
    refused(ask("aesthetic", tmp_path / "head.pth"), "is no checkpoint")
    torch.save({"layers": Path("an object is made by code")}, tmp_path / "code.pth")
    refused(ask("aesthetic", tmp_path / "code.pth"), "is no checkpoint")
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pth")
    refused(ask("aesthetic", tmp_path / "other.pth"), "no predictor")
    relu = {f"layers.{n}.{part}": torch.ones(1, 1) for n in (0, 3) for part in ("weight", "bias")}
    torch.save(relu, tmp_path / "relu.pth")
    refused(ask("aesthetic", tmp_path / "relu.pth"), "no predictor of linear layers alone")
    (tmp_path / "empty").mkdir()
    refused(ask("aesthetic", tmp_path / "empty"), "no weights", "model.safetensors")
    layer = {"layers.0.weight": torch.ones(1, 5), "layers.0.bias": torch.ones(1)}
    torch.save(layer, tmp_path / "narrow.pth")
    narrow = Models({"clip": models["clip"], "aesthetic": tmp_path / "narrow.pth"})
    refused(lambda: measure(["frames-quality"], edit, models=narrow), "5 channels", str(SHARED))


def test_pickscore_is_prepared_as_it_was_trained(folders, tmp_path):
    net = transformers.CLIPModel.from_pretrained(folders / "pickscore")
    net.save_pretrained(tmp_path / "bare")
    refused(ask("pickscore", tmp_path / "bare"), "laion/CLIP-ViT-H-14")


def test_weights_that_are_missing_in_a_model_are_no_silent_noise(folders, tmp_path):
    net = transformers.CLIPModel.from_pretrained(folders / "clip")
    state = net.state_dict()
    del state["visual_projection.weight"]
    net.save_pretrained(tmp_path, state_dict=state)
    refused(ask("clip", tmp_path), "lacks 1 weights", "visual_projection")


def test_packages_that_are_not_there_are_named(without, edit):
    for name in ("third_party", "lpips", "transformers"):
        without(name)
    missing = {"error": ImportError}
    for role in ("dover", "viclip", "gmflow"):
        refused(ask(role), role, "git clone", "PYTHONPATH", "timm", **missing)
    refused(lambda: measure(["lpips-t"], edit), "pip install lpips", **missing)
    refused(lambda: measure(["semantic-consistency"], edit), "tvkernels[diffusers]", **missing)


def test_weights_of_packages_are_looked_for_and_named(third_party, monkeypatch, tmp_path):
    for role, file in (
        ("dover", "DOVER/DOVER.pth"),
        ("gmflow", "gmflow/gmflow_sintel-0c07dcb3.pth"),
        ("viclip", "ViCLIP/ViClip-InternVid-10M-FLT.pth"),
    ):
        torch.save({"model": {"other": torch.ones(2)}}, third_party / file)
        refused(ask(role), role, "is of another network")
        torch.save({"state": torch.ones(1)}, third_party / file)
        refused(ask(role), role, "is of another network")
        torch.save([1], third_party / file)
        refused(ask(role), role, "is no checkpoint")
        (third_party / file).unlink()
        refused(ask(role), f"no weights at {third_party / file}", "install.sh")
    (third_party / "ViCLIP/bpe_simple_vocab_16e6.txt.gz").unlink()
    refused(ask("viclip"), "bpe_simple_vocab_16e6.txt.gz", third_party)

    fake = SimpleNamespace(LPIPS=lambda net, verbose: nn.Identity())
    monkeypatch.setitem(sys.modules, "lpips", fake)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    refused(ask("lpips"), tmp_path / "hub", "download.pytorch.org/models/alexnet")
    refused(ask("lpips", "resnet"), "'resnet'", "alex, vgg, squeeze")
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints/vgg16-397923af.pth").write_text("", encoding="utf-8")
    assert isinstance(Models({"lpips": "vgg"})["lpips"], nn.Identity)


def test_a_refusal_is_remembered(monkeypatch):
    asked = []

    def load(name, on):
        asked.append(name)
        raise MetricError("not here")

    monkeypatch.setitem(ROLES, "clip", ROLES["clip"]._replace(load=load))
    models = Models()
    for _ in range(2):
        refused(lambda: models["clip"], "not here")
    assert asked == ["openai/clip-vit-large-patch14"]


def test_importing_it_loads_nothing_of_weight():
    code = (
        "import sys, tvkernels.video.metrics; "
        "assert not {'transformers', 'cv2', 'PIL', 'safetensors'} & set(sys.modules)"
    )
    printed(code)


@pytest.fixture
def run(folders, edit, source, tmp_path):
    """Runs the command beside a clip and its source, twice as long; gives what it printed."""
    app = typer.Typer()
    app.command()(metrics_command)
    write_video(tmp_path / "edit", edit, 8)
    write_video(tmp_path / "source", np.repeat(source, 2, axis=0), 8)
    small = [f"--model={role}={folders / role}" for role in ("clip", "pickscore", "dino")]

    def go(*arguments, clip="edit"):
        named = [str(tmp_path / a) if a == "source" else a for a in arguments]
        result = CliRunner().invoke(app, [str(tmp_path / clip), *named, *small])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.output

    return go


def test_the_command_measures_what_it_can_and_says_what_the_rest_lacks(
    run, models, edit, source, without
):
    without("third_party")
    asked = ["--metric", "frames-text-alignment", "--metric", "motion-alignment-dis"]
    printed = run(
        "--source", "source", "--stride", "2", "--prompt", "a blue star", "--json", *asked
    )
    expected = measure(asked[1::2], edit, source=source, prompt="a blue star", models=models)
    assert json.loads(printed)["metrics"] == pytest.approx(expected, rel=1e-6)
    shown = run("--model", "aesthetic=./none.pth")
    assert "semantic-consistency" in shown and "higher" in shown
    assert "motion-alignment, motion-alignment-dis" not in shown
    assert "frames-text-alignment needs the edit's prompt" in shown
    assert "video-quality: dover needs V2VBench's code" in shown
    shown = json.loads(run("--json"))
    assert set(shown["metrics"]) | set(shown["lacks"]) == set(METRICS)


def test_the_command_refuses_in_one_line(run, without):
    without("third_party")
    asked = ["--metric", "video-quality"]
    refused(lambda: run(*asked), "git clone", error=ImportError)
    refused(lambda: run(*asked, "--metric", "motion-alignment"), "needs the source clip")
    refused(lambda: run(clip="none"), "none", error=VideoError)
    refused(lambda: run("--metric", "sharpness"), "'sharpness'")
    refused(lambda: run("--source", "source"), "9 frames", "18", "--stride", error=VideoError)
    refused(lambda: run("--source", "source", "--start", "12"), "18 frames", error=VideoError)
    refused(lambda: run("--model", "clip"), "role=name", "'clip'")
    refused(lambda: run("--model", "clap=x"), "'clap'")
