"""TensorRT: engines built ahead of time without a GPU, and all that is refused about them."""

import json
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("diffusers")

from exports import exported, inflated, shape

from tvkernels.runtime import _engine, _trt, files, tensorrt
from tvkernels.runtime.files import ArtifactError

try:
    NAME, TRT = tensorrt.library()
except ArtifactError as error:
    pytest.skip(str(error), allow_module_level=True)
SIZES = ((8, 8), (8, 8), (16, 16))  # smallest, usual, largest
ONLY_RTX = pytest.mark.skipif(NAME != "tensorrt_rtx", reason="TensorRT itself builds on a GPU")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """recipe -> its ONNX file."""
    return lambda recipe: exported(recipe, tmp_path_factory)


@pytest.fixture(scope="module")
def engine(path, tmp_path_factory):
    """A video UNet's engine in float32 for sm_86, and what was said while it was built."""
    said = []
    target = tmp_path_factory.mktemp("engine") / "model.sm_86.engine"
    tensorrt.build(
        path("ei2"), target, arch="sm_86", clips=(1, 2, 2), sizes=SIZES, say=said.append
    )
    return target, said


def spoil(file, **changes):
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, **changes}), encoding="utf-8")


def check_profile(target, recipe, arch, dtype, frames):
    about = files.read(target.with_suffix(".json"), "tensorrt")
    assert (about["arch"], about["dtype"]) == (arch, dtype)
    assert about["recipe"]["name"] == recipe
    sizes = [[clips * frames, 4, h, w] for clips, (h, w) in zip((1, 2, 2), SIZES, strict=True)]
    assert about["profile"]["sample"] == sizes
    assert about["layers"] > 300
    size = target.stat().st_size
    assert size == about["files"][target.name]["bytes"] > 10**6 // (2 if dtype == "float16" else 1)
    assert sorted(p.name for p in target.parent.iterdir()) == sorted(
        (target.name, target.with_suffix(".json").name)
    )


@ONLY_RTX
def test_a_video_unet_builds_in_float32_with_sizes_that_vary(engine):
    check_profile(engine[0], "ei2", "sm_86", "float32", 3)


@pytest.mark.slow
@ONLY_RTX
@pytest.mark.parametrize(
    ("recipe", "arch", "dtype", "frames"),
    [("tune-a-video", "sm_80", "float32", 3), ("frame-by-frame", "sm_89", "float16", 1)],
)
def test_other_unets_types_and_architectures(path, tmp_path, recipe, arch, dtype, frames):
    target = tmp_path / "engine"
    tensorrt.build(path(recipe), target, arch=arch, clips=(1, 2, 2), sizes=SIZES)
    check_profile(target, recipe, arch, dtype, frames)


@ONLY_RTX
def test_an_engine_says_what_it_is(engine):
    target, said = engine
    about = files.read(target.with_suffix(".json"), "tensorrt")
    assert (about["library"], about["library_version"]) == (NAME, _trt.version(NAME))
    assert f"{about['layers']} layers" in said[0]
    assert any("Building" in line for line in said), "no progress"
    assert str(target.stat().st_size) in said[-1]


@ONLY_RTX
def test_engines_that_do_not_fit_are_one_clear_line(engine, tmp_path):
    source, _ = engine
    target = tmp_path / source.name
    target.write_bytes(source.read_bytes())
    about = target.with_suffix(".json")

    def reset(**changes):
        about.write_bytes(source.with_suffix(".json").read_bytes())
        spoil(about, **changes)

    reset()
    message = "an engine for sm_86 needs such a GPU here"
    if torch.cuda.is_available():
        message = "sm_86"
    with pytest.raises(ArtifactError, match=message):
        tensorrt.load(target)
    reset(library_version="0.9")
    with pytest.raises(ArtifactError, match=r"was built by tensorrt_rtx 0\.9, here is"):
        tensorrt.load(target)
    reset(library="tensorrt")
    with pytest.raises(ArtifactError, match="was built by tensorrt "):
        tensorrt.load(target)
    reset(format=0)
    with pytest.raises(ArtifactError, match="is of format 0"):
        tensorrt.load(target)
    reset()
    target.write_bytes(target.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="is truncated"):
        tensorrt.load(target)
    with pytest.raises(ArtifactError, match="no file"):
        tensorrt.load(tmp_path / "gone")


def test_an_engine_for_another_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with pytest.raises(ArtifactError, match="an engine for sm_89 does not run on this sm_90"):
        tensorrt.check_device("sm_89")
    tensorrt.check_device("sm_90")


@ONLY_RTX
def test_builds_that_cannot_be_are_one_clear_line(path, tmp_path, monkeypatch):
    source, target = path("ei2"), tmp_path / "engine"
    for options, message in (
        ({"arch": "sm_90"}, "builds for sm_75, sm_80"),
        ({"arch": "sm_17"}, "unknown architecture 'sm_17'"),
        ({"arch": "sm_80", "weights": "none"}, "use one of kept, refit, stripped"),
        ({"arch": "sm_80", "weights": "refit"}, "with a GPU only"),
        ({"arch": "sm_80", "clips": (2, 1, 2)}, "a smallest, a usual and a largest"),
    ):
        with pytest.raises(ArtifactError, match=message):
            tensorrt.build(source, target, **options)
    with pytest.raises(ArtifactError, match="the size 8 x 8 alone"):
        about = files.read(source.with_name("metadata.json"), "onnx")
        tensorrt.profile_shapes(
            {**about, "dynamic_size": False}, (1, 1, 1), ((8, 8),) * 2 + ((16, 16),)
        )
    monkeypatch.setattr(files, "read", lambda *args: {**about, "plugins": True})
    with pytest.raises(ArtifactError, match="has no plugins"):
        tensorrt.build(source, target, arch="sm_80")
    monkeypatch.setattr(files, "read", lambda *args: about)
    (tmp_path / "model.onnx").write_bytes(source.read_bytes()[:-500])
    with pytest.raises(ArtifactError, match="TensorRT does not parse"):
        tensorrt.build(tmp_path / "model.onnx", target, arch="sm_80")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_a_missing_library_names_what_to_install(monkeypatch):
    monkeypatch.setattr(_trt, "LIBRARIES", {"absent_tensorrt": (), "absent.tensorrt": ()})
    with pytest.raises(ArtifactError, match=r"not installed .*pip install"):
        _trt.library()


def test_strong_typing_is_asked_for_where_it_is_a_choice():
    def flags(**members):
        kind = types.SimpleNamespace(__members__=members)
        return _trt.flags(types.SimpleNamespace(NetworkDefinitionCreationFlag=kind))

    assert flags(EXPLICIT_BATCH=0, STRONGLY_TYPED=1) == 2
    assert flags() == 0


class Context:
    """Stands for an execution context; "runs" by noting what it was given."""

    def __init__(self):
        self.shapes, self.addresses, self.streams = {}, {}, []

    def set_input_shape(self, name, given):
        self.shapes[name] = given

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        self.streams.append(stream)
        return True


@ONLY_RTX
def test_execution_hands_over_torchs_own_memory(engine, monkeypatch):
    about = files.read(engine[0].with_suffix(".json"), "tensorrt")
    stream = types.SimpleNamespace(cuda_stream=1234)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    run = _engine.Engine.__new__(_engine.Engine)
    run.about, run.device, run.context = about, torch.device("cpu"), Context()
    own = torch.float32
    run.types = dict(sample=own, encoder_hidden_states=own, out_sample=own, timestep=torch.int64)
    inputs = shape(inflated("ei2")).example(2, own)
    result = run(*inputs)
    names = ("sample", "timestep", "encoder_hidden_states", "out_sample")
    expected = {n: x.data_ptr() for n, x in zip(names, (*inputs, result), strict=True)}
    assert run.context.addresses == expected
    assert run.context.shapes == {n: tuple(x.shape) for n, x in zip(names, inputs, strict=False)}
    assert run.context.streams == [1234]
    with pytest.raises(ValueError, match="build one for this shape"):
        run(*shape(inflated("ei2")).example(4, own))
    run.context.execute_async_v3 = lambda stream: False
    with pytest.raises(RuntimeError, match="did not run"):
        run(*inputs)


@pytest.mark.slow
@ONLY_RTX
@pytest.mark.parametrize(
    "method", ["ei2", "tune-a-video", "frame-by-frame", "tcve", "blended-diffusion"]
)
def test_the_whole_demo_unet_builds_for_three_architectures(method, tmp_path, capsys):
    pytest.importorskip("typer")
    pytest.importorskip("pydantic")
    from tvkernels.cli import main

    archs = [part for arch in ("sm_80", "sm_86", "sm_89") for part in ("--arch", arch)]
    place = ["-o", str(tmp_path / "x")]
    assert main(["export", "--method", method, "--format", "tensorrt", *archs, *place]) == 0
    with capsys.disabled():
        for line in capsys.readouterr().out.splitlines():
            if "layers" in line or "bytes" in line:
                print(f"\n{method}: {line}", end="")
    built = sorted(file.name for file in (tmp_path / "x" / "unet").glob("*.engine"))
    assert built == [f"model.{arch}.engine" for arch in ("sm_80", "sm_86", "sm_89")]


@pytest.mark.slow
@ONLY_RTX
def test_a_unet_of_stable_diffusions_size_builds_in_float16(tmp_path, capsys):
    from diffusers import UNet2DConditionModel

    import tvkernels
    from tvkernels.recipes import RECIPES
    from tvkernels.runtime import onnx
    from tvkernels.runtime.program import shape_of

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    unet = unet.half().to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.normal_(std=0.02)
    handle = tvkernels.inflate(unet, RECIPES["frame-by-frame"])
    made = shape_of(handle, 1, (64, 64))
    path = onnx.export(handle, made, tmp_path)
    assert path.with_name("model.onnx.data").stat().st_size > 1.7e9
    target = tensorrt.build(path, tmp_path / "engine", arch="sm_89", clips=(1, 2, 2))
    assert target.stat().st_size > 1.7e9
    assert Path(target).with_suffix(".json").is_file()
