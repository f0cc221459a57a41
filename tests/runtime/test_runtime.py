"""One call for every runtime: parity with eager, one graph, one line for errors."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")

from tiny_unets import clip_inputs, one_level_unet, seeded, tiny_unet

from tvkernels import BackendError, FramePattern, inflate, recipes
from tvkernels._dispatch import auto_takes
from tvkernels.runtime import BACKENDS, accelerate, aoti, cuda_graph, why_not
from tvkernels.runtime.files import ArtifactError
from tvkernels.runtime.program import shape_of
from tvkernels.testing.budget import assert_error_budget

RECIPES = recipes.RECIPES
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs():
    """How many graphs were compiled, and what broke them."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], dict(counters["graph_break"])


def check(runner, arguments, **more):
    """A runner against every op's reference, in its dtype and in float64."""
    found = runner(*arguments, **more).sample
    with auto_takes("reference"):
        plain = copy.deepcopy(runner.handle.model)
        low = accelerate(plain)(*arguments, **more).sample
        wide = (x.double() if x.is_floating_point() else x for x in arguments)
        exact = accelerate(plain.double())(*wide, **more).sample
    assert_error_budget(found, low, exact)


@every_recipe
def test_eager_is_the_unet_within_budget(recipe):
    unet = tiny_unet()
    with inflate(unet, recipe, generator=seeded()):
        runner = accelerate(unet)
        for clips, frames in ((2, 3), (1, 4)):
            sample, t, text = clip_inputs(clips, frames)
            check(runner, (sample, t, text))
            row = runner.times(t.reshape(1))[0]
            check(runner, (sample, row, runner.text(text)))


def test_diffusers_form():
    unet = tiny_unet()
    sample, t, text = clip_inputs(2, 3)
    with inflate(unet, recipes.EI2, generator=seeded()):
        runner = accelerate(unet)
        kwargs = {"cross_attention_kwargs": {"num_frames": 3}}
        named = runner(sample, 301, encoder_hidden_states=text, return_dict=False, **kwargs)
        assert isinstance(named, tuple)
        assert torch.equal(named[0], runner(sample, t, text).sample)
        assert runner.config is unet.config and runner.dtype == torch.float32
        other = runner.handle.tables(3)
        assert torch.equal(named[0], runner(sample, t, text, tables=other).sample)


# TCVE takes more of torch.compile than the others, which share their graphs' kinds with EI2.
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(r, marks=[] if name in ("ei2", "tcve") else pytest.mark.slow, id=name)
        for name, r in RECIPES.items()
    ],
)
def test_compiled_once_for_steps_prompts_patterns_and_frame_counts(recipe):
    """From 16 images on: below, PyTorch's convolutions for CPUs are others, with a graph of their
    own. What the compiler makes of the graph is another test's."""
    unet = one_level_unet()
    with inflate(unet, recipe, generator=seeded()):
        eager = accelerate(unet)
        runner = accelerate(unet, "compile", compiler="aot_eager")
        times = eager.times(torch.tensor([901, 501, 1]))

        def same(frames, step, seed, pattern=None):
            sample, _, text = clip_inputs(2, frames, seed=seed)
            tables = None if pattern is None else (pattern.table(frames),)
            call = (sample, times[step], eager.text(text))
            torch.testing.assert_close(
                runner(*call, tables=tables).sample, eager(*call, tables=tables).sample
            )

        same(8, 0, 0)
        assert graphs() == (1, {})
        for step in (1, 2):
            same(8, step, step)
        for frames in (9, 12, 16):
            same(frames, 0, frames)
        for pattern in (
            FramePattern.all(), FramePattern.previous_own(), FramePattern.fine_coarse(2),
            FramePattern.rows([[f, (f + 3) % 8] for f in range(8)]),
        ):  # fmt: skip
            same(8, 0, 0, pattern)
        assert graphs() == (1, {})


@pytest.mark.parametrize(
    "regional", (False, pytest.param(True, marks=pytest.mark.slow)), ids=("whole", "regional")
)
def test_compiled_code_is_within_budget(regional):
    unet = one_level_unet()
    with inflate(unet, recipes.EI2, generator=seeded()):
        runner = accelerate(unet, "compile", regional=regional)
        sample, t, text = clip_inputs(1, 4)
        check(runner, (sample, runner.times(t.reshape(1))[0], runner.text(text)))
        assert graphs()[1] == {}
    assert all(module._compiled_call_impl is None for module in unet.modules())


def test_trained_weights_count_at_once():
    """What reads the UNet's own weights needs no word of a change."""
    unet = one_level_unet()
    call = clip_inputs(1, 4)
    with inflate(unet, recipes.EI2, generator=seeded()) as handle:
        runner = accelerate(unet, "compile", compiler="aot_eager")
        before = runner(*call).sample
        with torch.no_grad():
            for parameter in handle.tuned_parameters().values():
                parameter.mul_(1.5)
        runner.weights_changed()
        after = runner(*call).sample
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, accelerate(unet)(*call).sample)
    assert graphs() == (1, {})


def test_what_cannot_run_says_why():
    unet = tiny_unet()
    with pytest.raises(ValueError, match="not inflated"):
        accelerate(unet)
    with inflate(unet, recipes.EI2):
        with pytest.raises(ValueError, match="unknown runtime 'tpu': use one of eager, compile"):
            accelerate(unet, "tpu")
        with pytest.raises(ValueError, match="the runtime compile has no option 'speed'"):
            accelerate(unet, "compile", speed=9)
        if not torch.cuda.is_available():
            with pytest.raises(BackendError, match="the UNet is on the cpu, a graph needs CUDA"):
                accelerate(unet, "cuda_graph")
        for backend in BACKENDS:
            assert all(isinstance(reason, str) for reason in why_not(backend))
        sample, t, text = clip_inputs(2, 3)
        runner = accelerate(unet)
        with pytest.raises(ValueError, match="6 images are not 2 clips of 4 frames"):
            runner(sample, t, text, cross_attention_kwargs={"num_frames": 4})
        with pytest.raises(ValueError, match=r"cannot honour cross_attention_kwargs \['gligen'\]"):
            runner(sample, t, text, cross_attention_kwargs={"gligen": 1})
        compiled = accelerate(unet, "compile")
        with pytest.raises(ValueError, match=r"compile cannot honour .* \['scale'\]"):
            compiled(sample, t, text, cross_attention_kwargs={"scale": 0.5})


def test_graphs_are_captured_again_where_weights_lie_elsewhere(monkeypatch):
    """The captured one would read memory that another tensor may have by now."""
    unet, captured = one_level_unet(), []
    with inflate(unet, recipes.FRAME_BY_FRAME) as handle:
        graphs = cuda_graph.Graphs(handle, None)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())

        def capture(inputs, tables):
            captured.append(1)
            return SimpleNamespace(replay=lambda: None), [x.clone() for x in inputs], inputs[0]

        monkeypatch.setattr(graphs, "_capture", capture)
        call = (torch.zeros(1, 3, 4, 8, 8), torch.tensor(1), torch.zeros(1, 5, 8))
        for _ in range(2):
            graphs(*call)
        assert len(captured) == 1
        held = [parameter.data for parameter in unet.parameters()]  # so that places stay taken
        for parameter in unet.parameters():
            parameter.data = parameter.data.clone()
        graphs(*call)
        assert len(captured) == 2 and len(graphs._captured) == 1 and held


@pytest.mark.slow
@every_recipe
def test_a_package_is_code_alone_and_takes_the_weights_of_now(recipe, tmp_path):
    unet = one_level_unet()
    sample, t, text = clip_inputs(1, 4)
    with inflate(unet, recipe, generator=seeded()) as handle:
        runner = accelerate(unet, "aoti", folder=tmp_path)

        def call():
            return sample, runner.times(t.reshape(1))[0], runner.text(text)

        check(runner, call())
        (package,) = tmp_path.iterdir()
        made = package.stat()
        before = runner(*call()).sample
        with torch.no_grad():
            for parameter in handle.tuned_parameters().values():
                parameter.mul_(1.5)
        runner.weights_changed()
        check(runner, call())
        assert torch.equal(runner(*call()).sample, before) == (not recipe.tuned)
        assert package.stat() == made and list(tmp_path.iterdir()) == [package]
        package.write_bytes(package.read_bytes()[:1000])
        with pytest.raises(ValueError, match="cannot be loaded .*: delete it"):
            accelerate(unet, "aoti", folder=tmp_path)(*call())


@pytest.mark.slow
def test_an_exported_package_holds_its_weights(tmp_path):
    unet, said = one_level_unet(), []
    with inflate(unet, recipes.EI2, generator=seeded()) as handle:
        shape = shape_of(handle, 3, (8, 8), 5)
        aoti.write_into(tmp_path, handle, shape, clips=(1, 2), say=said.append)
        assert [line for line in said if "model.2.pt2" in line]
        inputs = shape.example(2, unet.dtype)
        runner = accelerate(unet)
        check(runner, inputs)
        expected = runner(*inputs).sample
        with torch.no_grad():
            unet.conv_out.bias.add_(1)
        run = aoti.load_whole(tmp_path)
        torch.testing.assert_close(run(*inputs), expected)
        with pytest.raises(ValueError, match="takes 1, 2 clips in a call, got 3"):
            run(*shape.example(3, unet.dtype))
    about = tmp_path / "metadata.json"
    whole = about.read_text(encoding="utf-8")
    about.write_text(
        whole.replace(f'"torch": "{torch.__version__}"', '"torch": "2.0"'), encoding="utf-8"
    )
    with pytest.raises(ArtifactError, match=r"compiled by torch 2\.0, here is .*: export again"):
        aoti.load_whole(tmp_path)
    about.write_text(whole, encoding="utf-8")
    package = tmp_path / "model.1.pt2"
    package.write_bytes(package.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="model.1.pt2 is truncated"):
        aoti.load_whole(tmp_path)


def test_regional_graphs_are_as_many_as_sizes():
    """Blocks of one size share one; more clips are other sizes."""
    unet = tiny_unet(
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(32, 64),
    )  # fmt: skip
    blocks = sum(type(m).__name__ == "BasicTransformerBlock" for m in unet.modules())
    with inflate(unet, recipes.EI2, generator=seeded()):
        eager = accelerate(copy.deepcopy(unet))
        runner = accelerate(unet, "compile", compiler="aot_eager", regional=True)
        for clips in (1, 2):
            sample, t, text = clip_inputs(clips, 4)
            call = (sample, eager.times(t.reshape(1))[0], eager.text(text))
            torch.testing.assert_close(runner(*call).sample, eager(*call).sample)
            found = graphs()
            for step in (901, 1):
                time = eager.times(torch.tensor([step]))[0]
                runner(sample, time, eager.text(text))
            assert graphs() == found and found[1] == {}
    assert blocks == 7 and found[0] <= 2 * 5
