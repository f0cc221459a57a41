"""Installing processors in diffusers' models: what is patched, refused, noticed and restored."""

import copy
import sys
import types

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from diffusers import ControlNetModel, UNet1DModel
from diffusers.models.attention_processor import AttnProcessor2_0
from tiny_unets import (
    MOTION,
    TINY,
    VIDEO,
    LogLines,
    assert_rounding,
    build,
    clip_inputs,
    one_level_unet,
    tiny_unet,
)
from tiny_unets import (
    run_installed as run,
)

from tvkernels import FramePattern, inflate, install, recipes
from tvkernels.processors import Clip, FrameAttnProcessor, TemporalAttnProcessor
from tvkernels.processors.attention import LibraryAttnProcessor

OWN = FramePattern.own()
PREVIOUS = FramePattern.first_previous()


@pytest.fixture
def unet():
    return tiny_unet()


# Installation on a UNet.


def test_own_frames_equal_the_stock_unet(unet):
    sample, t, text = clip_inputs()
    expected = run(unet, sample, t, text, None)
    with install(unet, OWN):
        assert_rounding(run(unet, sample, t, text), expected)


def test_install_reports_layers_and_leaves_cross_attention_alone(unet):
    before = dict(unet.attn_processors)
    handle = install(unet, PREVIOUS)
    spatial = [name.removesuffix(".processor") for name in before if "attn1" in name]
    assert handle.layers == spatial and len(spatial) == 10
    after = unet.attn_processors
    assert all(after[name] is before[name] for name in before if "attn2" in name)
    assert all(isinstance(after[f"{n}.processor"], FrameAttnProcessor) for n in spatial)
    assert repr(handle) == "Handle(UNet2DConditionModel, 10 layers)"


@pytest.mark.parametrize("context", [False, True], ids=["remove", "with"])
def test_removal_restores_everything(unet, context):
    sample, t, text = clip_inputs()
    expected = run(unet, sample, t, text, None)
    processors, attributes = dict(unet.attn_processors), set(vars(unet))
    if context:
        with pytest.raises(KeyError), install(unet, PREVIOUS):
            assert not torch.equal(run(unet, sample, t, text), expected)
            raise KeyError
    else:
        handle = install(unet, PREVIOUS)
        handle.remove()
        handle.remove()
    assert all(
        a is b for a, b in zip(processors.values(), unet.attn_processors.values(), strict=True)
    )
    assert set(vars(unet)) == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())
    assert torch.equal(run(unet, sample, t, text, None), expected)


def test_installing_twice_is_refused(unet):
    with install(unet, OWN):
        with pytest.raises(RuntimeError, match="already patched by tvkernels"):
            install(unet, PREVIOUS)
        run(unet, *clip_inputs())
    install(unet, PREVIOUS).remove()


def test_prefixes_choose_layers_and_patterns(unet):
    """Pix2Video patches the decoder; Vid2Vid-Zero mixes two patterns."""
    with install(unet, {"up_blocks": PREVIOUS}) as handle:
        assert handle.layers and all(name.startswith("up_blocks") for name in handle.layers)
    dense = ("down_blocks.0.attentions.0", "mid_block", "up_blocks.1.attentions.0")
    with install(unet, {"": PREVIOUS, **dict.fromkeys(dense, FramePattern.all())}) as handle:
        for name, processor in handle.processors.items():
            expected = FramePattern.all() if name.startswith(dense) else PREVIOUS
            assert processor.pattern == expected
        assert len(handle.layers) == 10
        run(unet, *clip_inputs())
    with pytest.raises(ValueError, match="no self-attention layer .* is named 'uppp': they"):
        install(unet, {"up_blocks": PREVIOUS, "uppp": PREVIOUS})
    with pytest.raises(ValueError, match="one for each prefix, not 'first'"):
        install(unet, "first")
    assert not unet._forward_pre_hooks
    with pytest.raises(TypeError, match="a list is no model: give the unet of a pipeline"):
        install([unet], OWN)
    with pytest.raises(ValueError, match="UNet1DModel is one to serve"):
        install(UNet1DModel(block_out_channels=(8, 8, 16)), OWN)


def test_patterns_change_the_output(unet):
    sample, t, text = clip_inputs()
    own = run(unet, sample, t, text, None)
    with install(unet, {"up_blocks": PREVIOUS}):
        decoder = run(unet, sample, t, text)
    with install(unet, PREVIOUS):
        whole = run(unet, sample, t, text)
    assert not torch.allclose(own, decoder, atol=1e-4)
    assert not torch.allclose(decoder, whole, atol=1e-4)


def test_only_cross_attention_blocks_are_left_alone():
    unet = tiny_unet(only_cross_attention=(True, False, False, False))
    with install(unet, OWN) as handle:
        assert not any(name.startswith("down_blocks.0") for name in handle.layers)
        run(unet, *clip_inputs())


def test_deep_copies_are_independent(unet):
    sample, t, text = clip_inputs()
    handle = install(unet, PREVIOUS)
    expected = run(unet, sample, t, text)
    twin = copy.deepcopy(unet)
    handle.remove()
    assert torch.equal(run(twin, sample, t, text), expected)
    twin._tvkernels_handle.remove()
    assert torch.equal(run(twin, sample, t, text, None), run(unet, sample, t, text, None))


# What is found in place of the default processors, before and after.


def fake_xformers(unet):
    fake = type("XFormersAttnProcessor", (AttnProcessor2_0,), {})
    unet.set_attn_processor(fake())


CHANGES = {
    "fused": (lambda unet: unet.fuse_qkv_projections(), "unfuse_qkv_projections"),
    "sliced": (lambda unet: unet.set_attention_slice("max"), "set_attention_slice"),
    "xformers": (fake_xformers, "disable_xformers"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_foreign_processors_are_refused_with_the_remedy(unet, change):
    apply, remedy = CHANGES[change]
    with torch.no_grad():
        apply(unet)
    processors = list(unet.attn_processors.values())
    with pytest.raises(RuntimeError, match=f"attn1 holds .*{remedy}.*more layers"):
        install(unet, OWN)
    assert all(a is b for a, b in zip(processors, unet.attn_processors.values(), strict=True))
    assert not unet._forward_pre_hooks


def test_the_remedies_work(unet):
    sample, t, text = clip_inputs()
    expected = run(unet, sample, t, text, None)
    with torch.no_grad():
        unet.fuse_qkv_projections()
        unet.unfuse_qkv_projections()
    install(unet, OWN).remove()
    unet.set_attention_slice("max")
    unet.set_attention_slice(None)
    with install(unet, OWN):
        assert_rounding(run(unet, sample, t, text), expected)


REPLACEMENTS = {
    "set_attn_processor": lambda unet: unet.set_attn_processor(AttnProcessor2_0()),
    "set_attention_slice": lambda unet: unet.set_attention_slice("max"),
    "fuse_qkv_projections": lambda unet: unet.fuse_qkv_projections(),
    "xformers": fake_xformers,
    "ip_adapter": lambda unet: unet.set_attn_processor(
        {name: type(p)() for name, p in unet.attn_processors.items()}
    ),
}


@pytest.mark.parametrize("replace", REPLACEMENTS)
def test_replacing_our_processors_is_noticed_at_the_next_call(unet, replace):
    sample, t, text = clip_inputs()
    expected = run(unet, sample, t, text, None)
    handle = install(unet, PREVIOUS)
    with torch.no_grad():
        REPLACEMENTS[replace](unet)
    with pytest.raises(RuntimeError, match="attn1 now holds .*handle.remove"):
        run(unet, sample, t, text)
    handle.remove()
    if replace not in ("fuse_qkv_projections", "set_attention_slice", "xformers"):
        assert torch.equal(run(unet, sample, t, text, None), expected)


def test_putting_our_processors_back_is_no_replacement(unet):
    with install(unet, OWN), torch.no_grad():
        unet.set_attn_processor(dict(unet.attn_processors))
        unet.fuse_qkv_projections()
        unet.unfuse_qkv_projections()
        run(unet, *clip_inputs())


# Other libraries' attention, by name.


@pytest.mark.parametrize("library", ["sdpa", "sdpa-math", "xformers"])
def test_a_library_attends_within_frames(unet, library, monkeypatch):
    calls = []

    def documented(q, k, v, attn_bias=None, p=0.0, scale=None):  # xformers' layout: [B, M, H, K]
        calls.append(q.shape)
        scores = torch.einsum("bmhd,bnhd->bhmn", q, k) * scale
        return torch.einsum("bhmn,bnhd->bmhd", scores.softmax(-1), v)

    module = types.SimpleNamespace(memory_efficient_attention=documented)
    monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(ops=module))
    monkeypatch.setitem(sys.modules, "xformers.ops", module)
    sample, t, text = clip_inputs()
    expected = run(unet, sample, t, text, None)
    with install(unet, OWN, attention=library) as handle:
        assert {type(p) for p in handle.processors.values()} == {LibraryAttnProcessor}
        assert_rounding(run(unet, sample, t, text), expected)
    assert len(calls) == (10 if library == "xformers" else 0)
    with inflate(unet, recipes.FRAME_BY_FRAME, attention=library):
        assert_rounding(run(unet, sample, t, text), expected)
    assert len(calls) == (30 if library == "xformers" else 0)


def test_a_library_never_replaces_frames_that_are_read(unet):
    for attempt in (
        lambda: install(unet, PREVIOUS, attention="sdpa"),
        lambda: install(unet, {"down_blocks": OWN, "up_blocks": PREVIOUS}, attention="sdpa"),
        lambda: inflate(unet, recipes.EI2, attention="sdpa"),
    ):
        with pytest.raises(ValueError, match=r"'sdpa' attends within a frame, and .*attn1 names"):
            attempt()
    with pytest.raises(ValueError, match="unknown attention 'fast': use one of sdpa, sdpa-flash"):
        install(unet, OWN, attention="fast")
    with pytest.raises(ImportError, match="attention 'flash-attn-4' is not to be had here"):
        install(unet, OWN, attention="flash-attn-4")
    assert all(type(p) is AttnProcessor2_0 for p in unet.attn_processors.values())
    assert not unet._forward_pre_hooks


def test_enabling_xformers_raises_without_a_device(unet):
    if torch.cuda.is_available():
        pytest.skip("xformers may be enabled where there is a CUDA device")
    with install(unet, OWN):
        with pytest.raises((ValueError, ModuleNotFoundError)):
            unet.enable_xformers_memory_efficient_attention()
        run(unet, *clip_inputs())


def test_masks_given_to_the_unet_are_refused(unet):
    sample, t, text = clip_inputs()
    with install(unet, OWN), pytest.raises(ValueError, match="cannot honour an attention_mask"):
        run(unet, sample, t, text, attention_mask=torch.ones(6, 64))


# Frames per clip.


def test_frames_come_from_the_handle_or_the_call(unet):
    sample, t, text = clip_inputs()
    with install(unet, PREVIOUS):
        named = run(unet, sample, t, text, 3)
        names = (None, None, None, {"num_frames": 3})
        with torch.no_grad(), LogLines() as lines:
            positional = unet(sample, t, text.repeat_interleave(3, 0), *names).sample
        assert torch.equal(named, positional) and not lines
        assert not torch.allclose(run(unet, sample, t, text, 2), named, atol=1e-4)
    with install(unet, PREVIOUS, num_frames=3):
        assert torch.equal(run(unet, sample, t, text, None), named)
        assert not torch.allclose(run(unet, sample, t, text, 2), named, atol=1e-4)


def test_without_frames_the_whole_batch_is_one_clip(unet):
    sample, t, text = clip_inputs()
    with install(unet, PREVIOUS):
        whole, six = run(unet, sample, t, text, None), run(unet, sample, t, text, 6)
        assert torch.equal(whole, six)
        first = run(unet, sample[:3], t, text[:1], 3)
    assert_rounding(whole[:3], first)


@pytest.mark.parametrize("frames", [4, 7, 0, -3])
def test_frames_that_do_not_divide_the_batch_are_an_error(unet, frames):
    sample, t, text = clip_inputs()
    message = f"6 images does not hold whole clips of {frames} frames"
    with install(unet, PREVIOUS), pytest.raises(ValueError, match=message):
        run(unet, sample, t, text, frames)
    with install(unet, OWN, num_frames=frames), pytest.raises(ValueError, match=message):
        run(unet, sample, t, text, None)


# Sizes.


def test_grids_are_halved_rounding_up():
    clip = Clip(size=(9, 14))
    grids = [clip.grid(h * w) for h, w in ((9, 14), (5, 7), (3, 4), (2, 2))]
    assert grids == [(9, 14), (5, 7), (3, 4), (2, 2)]
    assert clip.grid(36) is None and Clip().grid(4) is None
    assert Clip(size=(1, 3)).grid(1) == (1, 1)


@pytest.mark.parametrize("size", [(8, 16), (9, 14), (13, 8), (5, 7)])
def test_coarse_frames_are_pooled_over_each_layers_own_grid(unet, size, monkeypatch):
    from tvkernels.processors import attention as module

    sample, t, text = clip_inputs(size=size)
    grids, original = set(), module.frame_attention

    def spy(q, *args, grid, **kwargs):
        grids.add(grid)
        return original(q, *args, grid=grid, **kwargs)

    monkeypatch.setattr(module, "frame_attention", spy)
    sizes = [size]
    for _ in range(3):
        sizes.append(tuple(-(-side // 2) for side in sizes[-1]))
    with install(unet, FramePattern.fine_coarse(2)):
        out = run(unet, sample, t, text)
    assert grids == set(sizes)
    assert out.shape == sample.shape and torch.isfinite(out).all()


# Other models.


def test_controlnet():
    config = {key: value for key, value in TINY.items() if key not in ("up_block_types",)}
    config = {**config, "conditioning_embedding_out_channels": (8, 16)}
    config.pop("sample_size")
    torch.manual_seed(0)
    model = ControlNetModel(**config).eval()
    for block in model.controlnet_down_blocks:
        nn.init.normal_(block.weight, std=0.1)
    sample, t, text = clip_inputs()
    text, condition = text.repeat_interleave(3, 0), torch.rand(6, 3, 16, 16)

    def features(frames):
        kwargs = None if frames is None else {"num_frames": frames}
        with torch.no_grad():
            return model(sample, t, text, condition, cross_attention_kwargs=kwargs)[0]

    expected = features(None)
    with install(model, OWN) as handle:
        assert len(handle.layers) == 4
        for actual, wanted in zip(features(3), expected, strict=True):
            assert_rounding(actual, wanted)
    with install(model, PREVIOUS):
        assert not torch.allclose(features(3)[-1], expected[-1], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "config", "spatial"),
    [("UNetMotionModel", MOTION, 4), ("UNet3DConditionModel", VIDEO, 4)],
)
def test_models_with_layers_over_frames(name, config, spatial):
    model = build(name, config)
    sample, text = torch.randn(2, 4, 3, 8, 12), torch.randn(2, 5, 32)
    text = text.repeat_interleave(3, 0) if name == "UNetMotionModel" else text

    def run_video(**kwargs):
        with torch.no_grad():
            return model(sample, torch.tensor(7), text, **kwargs).sample

    expected = run_video()
    processors = dict(model.attn_processors)
    with install(model, OWN) as handle:
        kinds = [type(p) for p in handle.processors.values()]
        assert kinds.count(FrameAttnProcessor) == spatial
        temporal = [n for n, p in handle.processors.items() if type(p) is TemporalAttnProcessor]
        assert temporal and any(n.endswith("attn2") for n in temporal)
        assert set(processors) - {f"{n}.processor" for n in handle.layers} == {
            n for n in processors if "attn2" in n and ".attentions." in n
        }
        with LogLines() as lines:
            assert_rounding(run_video(), expected)
        assert not lines
        with pytest.raises(ValueError, match="holds 3 frames, num_frames says 2"):
            run_video(cross_attention_kwargs={"num_frames": 2})
    with install(model, FramePattern.fine_coarse(2)):
        assert not torch.allclose(run_video(), expected, atol=1e-4)
    assert torch.equal(run_video(), expected)


def test_models_without_self_attention_are_refused():
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = tiny_unet(**blocks, block_out_channels=(32,), mid_block_type=None)
    with pytest.raises(ValueError, match="no self-attention layer"):
        install(unet, OWN)


# torch.compile.


# The other pattern's layers are compiled by the test below, too.
@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(PREVIOUS, marks=pytest.mark.slow, id="prev"),
        pytest.param(FramePattern.fine_coarse(2), id="fc"),
    ],
)
def test_compiles_without_graph_breaks(pattern):
    unet = one_level_unet()
    sample, t, text = clip_inputs()
    torch._dynamo.reset()
    with install(unet, pattern):
        expected = run(unet, sample, t, text)
        compiled = torch.compile(unet, backend="aot_eager", fullgraph=True)
        assert_rounding(run(compiled, sample, t, text), expected)


def test_a_compiled_unet_sees_installation_and_removal():
    unet = one_level_unet()
    sample, t, text = clip_inputs()
    torch._dynamo.reset()
    compiled = torch.compile(unet, backend="aot_eager", fullgraph=True)
    plain = run(compiled, sample, t, text, None)
    with install(compiled, {"up_blocks": PREVIOUS}) as handle:
        assert handle.model is unet and all(name.startswith("up_") for name in handle.layers)
        patched = run(unet, sample, t, text)
        assert not torch.allclose(patched, plain, atol=1e-4)
        assert_rounding(run(compiled, sample, t, text), patched)
    assert_rounding(run(compiled, sample, t, text, None), plain)
