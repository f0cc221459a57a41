"""ONNX: standard operators, the same numbers as eager, and files that are whole or refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("diffusers")
pytest.importorskip("pydantic")
pytest.importorskip("typer")

import onnx
from exports import KINDS, TOKENS, exported, inflated, shape, truth

from tvkernels.cli import main
from tvkernels.runtime import _onnx_graph, accelerate, files
from tvkernels.runtime import onnx as runtime
from tvkernels.runtime.files import ArtifactError
from tvkernels.testing.budget import assert_error_budget

# The others share most of their operators with EI2.
RECIPES = [pytest.param(name, marks=[] if name == "ei2" else [pytest.mark.slow]) for name in KINDS]
# Three blocks with self, cross and frame attention; TCVE's unit after the last.
ATTENTIONS = {"ei2": 9, "tune-a-video": 9, "frame-by-frame": 6, "tcve": 10}
NAMES = ["sample", "timestep", "encoder_hidden_states"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """recipe -> its file."""
    return lambda recipe: exported(recipe, tmp_path_factory)


@pytest.fixture
def copied(path, tmp_path):
    """A copy of an export that a test may spoil."""
    folder = tmp_path / "unet"
    shutil.copytree(path("ei2").parent, folder)
    return folder / "model.onnx"


@pytest.mark.parametrize("recipe", RECIPES)
def test_any_clips_and_sizes_agree_with_eager(path, recipe):
    handle = inflated(recipe)
    run = runtime.load(path(recipe))
    for clips, height, width in ((1, 8, 8), (2, 6, 11), (3, 9, 5)):
        own = replace(shape(handle), height=height, width=width)
        inputs = own.example(clips, handle.model.dtype, seed=clips)
        low, exact = truth(handle, *inputs)
        assert_error_budget(run(*inputs), low, exact, what=f"{recipe} {clips} {height} {width}")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_file_is_standard_and_laid_out_as_optimum_does(path, recipe):
    model = onnx.load(path(recipe))
    graph, opset = model.graph, KINDS[recipe][1]
    assert {(e.domain, e.version) for e in model.opset_import} == {("", opset)}
    assert {node.domain for node in graph.node} == {""}
    assert [entry.name for entry in graph.input] == NAMES
    assert [entry.name for entry in graph.output] == ["out_sample"]
    sizes = [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim]
    assert sizes == ["images", 4, "height", "width"]
    text = [d.dim_param or d.dim_value for d in graph.input[2].type.tensor_type.shape.dim]
    assert text == ["clips", TOKENS, 32]
    kinds = [node.op_type for node in graph.node]
    # One each, whatever the frames.
    assert kinds.count("Attention" if opset >= 23 else "Softmax") == ATTENTIONS[recipe]
    assert not {"Gather", "GatherND", "ScatterND", "Loop", "If"} & set(kinds)
    assert (
        json.loads((path(recipe).parent / "config.json").read_text(encoding="utf-8"))[
            "in_channels"
        ]
        == 4
    )
    kept = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(kept["tvkernels.recipe"])["name"] == recipe
    assert {"tvkernels", "torch"} <= json.loads(kept["tvkernels.versions"]).keys()
    about = files.read(path(recipe).with_name("metadata.json"), "onnx")
    assert about["shape"]["frames"] == (1 if recipe == "frame-by-frame" else 3)


def test_initializers_keep_the_parameters_names_and_layout(path):
    own = {entry.name: list(entry.dims) for entry in onnx.load(path("ei2")).graph.initializer}
    for name, tensor in inflated("ei2").model.named_parameters():
        assert own[f"unet.{name}"] == list(tensor.shape)


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_file_serves_other_weights(path, recipe):
    handle = inflated(recipe)
    changed = {
        name: tensor * 1.1 for name, tensor in handle.model.state_dict().items() if "attn" in name
    }
    handle.model.load_state_dict(changed, strict=False)
    inputs = shape(handle).example(2, handle.model.dtype)
    low, exact = truth(handle, *inputs)
    run = runtime.load(path(recipe), weights=changed)
    assert_error_budget(run(*inputs), low, exact)
    stale = runtime.load(path(recipe))(*inputs)
    assert not torch.allclose(stale.double(), exact, rtol=1e-4), "the change is to be seen"


def test_weights_that_do_not_fit_are_named(path):
    name = "conv_in.weight"
    for weights in ({"conv_inn.weight": torch.ones(1)}, {name: torch.ones(2, 2)}):
        with pytest.raises(ArtifactError, match="conv_in"):
            runtime.load(path("ei2"), weights=weights)


def test_large_weights_lie_beside_the_file(path, copied):
    import onnx_ir

    written = _onnx_graph.save(onnx_ir.load(copied), copied.with_name("large.onnx"), 0)
    assert [file.name for file in written] == ["large.onnx", "large.onnx.data"]
    assert written[0].stat().st_size < copied.stat().st_size / 2
    about = files.read(copied.with_name("metadata.json"), "onnx")
    files.write(copied.with_name("metadata.json"), about, written)
    handle = inflated("ei2")
    inputs = shape(handle).example(1, torch.float32)
    changed = {"conv_out.bias": torch.full_like(handle.model.conv_out.bias, 3.0)}
    plain = runtime.load(written[0])(*inputs)
    assert torch.equal(plain, runtime.load(path("ei2"))(*inputs))
    other = runtime.load(written[0], weights=changed)(*inputs)
    assert not torch.allclose(other, plain)


def test_accelerate_takes_a_folder(path):
    handle = inflated("ei2")
    sample, time, text = shape(handle).example(2, torch.float32)
    runner = accelerate(handle.model, "onnx", folder=path("ei2").parents[1])
    low, exact = truth(handle, sample, time, text)
    assert_error_budget(runner(sample, time, text).sample, low, exact)
    # One clip under both texts: the file takes it twice.
    told = {"cross_attention_kwargs": {"num_frames": 3}}
    both = runner(sample[:3].repeat(2, 1, 1, 1), time, text).sample
    assert torch.equal(runner(sample[:3], time, text, **told).sample, both)


def test_calls_that_do_not_fit_say_what_would(path):
    run = runtime.load(path("ei2"))
    sample, time, text = shape(inflated("ei2")).example(2, torch.float32)
    for call, message in (
        ((sample[:5], time, text), "clips * 3"),
        ((sample, time, text[:, :4]), "text [clips, 5, 32]"),
        ((sample.half(), time, text), "computes in float32"),
        ((sample, time.reshape(1), text), "timestep []"),
    ):
        with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("*", r"\*")):
            run(*call)


def spoil(file, change):
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def test_a_damaged_export_is_one_clear_line(copied):
    about, whole = copied.with_name("metadata.json"), copied.read_bytes()
    copied.write_bytes(whole[:-100])
    with pytest.raises(ArtifactError, match="model.onnx is truncated"):
        runtime.load(copied)
    copied.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="checksum differs"):
        runtime.load(copied)
    copied.write_bytes(whole)
    spoil(about, lambda content: content.update(format=99))
    with pytest.raises(ArtifactError, match="format 99"):
        runtime.load(copied)
    spoil(about, lambda content: content.update(format=files.FORMAT, kind="tensorrt"))
    with pytest.raises(ArtifactError, match="describes tensorrt, not onnx"):
        runtime.load(copied)
    about.write_text("{", encoding="utf-8")
    with pytest.raises(ArtifactError, match="cannot be read"):
        runtime.load(copied)
    about.unlink()
    with pytest.raises(ArtifactError, match="tvk export"):
        runtime.load(copied)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_stops_an_export_leaves_nothing(tmp_path, monkeypatch, error):
    def stop(handle, shape, dynamic_size, plugins):
        raise error

    monkeypatch.setattr(runtime, "trace", stop)
    handle = inflated("ei2")
    with pytest.raises((KeyboardInterrupt, ArtifactError)):
        runtime.export(handle, shape(handle), tmp_path / "deep" / "out")
    assert not any(tmp_path.iterdir())


BAD = {
    "method": ("--method ei3", "unknown method 'ei3': use one of ei2"),
    "format": ("--format onyx", "unknown format 'onyx': use one of onnx, tensorrt, aoti"),
    "dtype": ("--dtype fp8", "use one of fp16, fp32"),
    "opset 26": ("--opset 26", "use 18 to 25"),
    "opset 17": ("--opset 17", "use 18 to 25"),
    "no arch": ("--format tensorrt", "--arch is missing"),
    "arch": ("--format tensorrt --arch sm_91", "unknown architecture 'sm_91': use one of sm_75"),
    "arch of onnx": ("--arch sm_89", "are for --format tensorrt"),
    "opset of aoti": ("--format aoti --opset 18", "--opset and --fixed-size are of ONNX"),
    "frames": ("--frames 0", "one frame or more"),
    "size": ("--size 50", "multiple of 8"),
    "halvings": ("--size 72", "multiple of 64 pixels"),
    "model": ("--model {tmp}/gone", "is no folder"),
    "in use": ("-o {tmp}/used", "not an empty folder"),
    "in a file": ("-o {tmp}/file", "is a file, not a folder"),
    "no output": ("", "Missing option"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line_and_leaves_nothing(name, tmp_path, capsys):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "used" / "unet").mkdir(parents=True)
    (tmp_path / "used" / "unet" / "x").touch()
    before = sorted(tmp_path.rglob("*"))
    line, message = BAD[name]
    arguments = ["export", *line.format(tmp=tmp_path).split()]
    if "-o" not in arguments and line:
        arguments += ["-o", str(tmp_path / "out")]
    assert main(arguments) == 2
    complaint = capsys.readouterr().err
    assert message in complaint
    assert complaint.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("ei2", ""), ("tune-a-video", ""), ("frame-by-frame", ""), ("tcve", "--frames 7"),
        ("ei2", "--dtype fp16"), ("ei2", "--opset 18"), ("ei2", "--projected-text --frames 5"),
    ],
)  # fmt: skip
def test_the_command_exports_the_demo_model_and_finds_it_right(method, more, tmp_path, capsys):
    arguments = ["export", "--method", method, "-o", str(tmp_path / "x"), "--check", *more.split()]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.count("within its budget") == 3
    print(shown)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [n for n in runtime.OPSETS if n not in (18, 23)])
def test_every_opset_agrees_with_eager(opset, tmp_path):
    handle = inflated("ei2")
    path = runtime.export(handle, shape(handle), tmp_path, opset=opset, dynamic_size=False)
    inputs = shape(handle).example(2, handle.model.dtype)
    low, exact = truth(handle, *inputs)
    assert_error_budget(runtime.load(path)(*inputs), low, exact)
