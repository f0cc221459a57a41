"""Published Tune-A-Video weights and, with them, the recipe against a plain model of it."""

import pytest
import torch

pytest.importorskip("diffusers")

from tiny_unets import assert_rounding, clip_inputs, drawn, tiny_unet

from tvkernels import inflate, install, load_published
from tvkernels.benchmarks.reference.tune_a_video import VideoUNet
from tvkernels.recipes import EI2, FRAME_BY_FRAME, TUNE_A_VIDEO

SIZES = {"layers_per_block": 2}


@pytest.fixture(scope="module")
def plain():
    return drawn(VideoUNet, SIZES["layers_per_block"])


@pytest.fixture
def unet():
    return tiny_unet(**SIZES)


def published(plain):
    """The plain model's weights under the names they are published with."""
    return {name: tensor.clone() for name, tensor in plain.state_dict().items()}


def run(unet, sample, t, text, frames):
    with torch.no_grad():
        return unet(sample, t, text, cross_attention_kwargs={"num_frames": frames}).sample


@pytest.mark.parametrize(
    ("frames", "size"), [(3, (8, 16)), (3, (9, 14)), (1, (8, 8)), (4, (8, 8))]
)
def test_the_recipe_equals_the_plain_model(plain, unet, frames, size):
    sample, t, text = clip_inputs(2, frames, size)
    inflate(unet, TUNE_A_VIDEO)
    load_published(unet, published(plain))
    with torch.no_grad():
        video = sample.unflatten(0, (2, frames)).transpose(1, 2)
        expected = plain(video, t, text).transpose(1, 2).flatten(0, 1)
    assert_rounding(run(unet, sample, t, text, frames), expected, factor=256)


def test_every_part_of_the_recipe_is_seen_by_that_comparison(plain, unet):
    """Each other choice is off by far more than rounding."""
    from dataclasses import replace

    sample, t, text = clip_inputs(2, 3)
    with inflate(unet, TUNE_A_VIDEO):
        load_published(unet, published(plain))
        expected = run(unet, sample, t, text, 3)
    changes = {
        "pattern": FRAME_BY_FRAME.pattern,
        "clip_group_norm": False,
        "temporal": replace(TUNE_A_VIDEO.temporal, norm="none"),
    }
    for field, value in changes.items():
        with inflate(unet, replace(TUNE_A_VIDEO, **{field: value})):
            state = published(plain)
            if field == "temporal":
                state = {n: x for n, x in state.items() if ".norm_temp." not in n}
            load_published(unet, state)
            other = run(unet, sample, t, text, 3)
        assert (other - expected).abs().max() > 1e-3 * expected.abs().max(), field


def test_names_are_those_of_the_published_model(plain):
    """Spelled out, so that the witness cannot drift together with the code under test."""
    names = set(published(plain))
    block = "up_blocks.1.attentions.2.transformer_blocks.0."
    for part in (
        "attn1.to_q.weight", "attn1.to_out.0.bias", "attn2.to_k.weight", "attn_temp.to_q.weight",
        "attn_temp.to_out.0.weight", "attn_temp.to_out.0.bias", "norm_temp.weight",
        "norm_temp.bias", "norm3.bias", "ff.net.0.proj.weight", "ff.net.2.bias",
    ):  # fmt: skip
        assert block + part in names
    for name in (
        "conv_in.weight", "time_embedding.linear_1.weight", "conv_norm_out.bias",
        "down_blocks.0.resnets.1.time_emb_proj.bias", "down_blocks.1.resnets.0.conv_shortcut.bias",
        "down_blocks.2.downsamplers.0.conv.weight", "mid_block.attentions.0.proj_in.weight",
        "up_blocks.0.upsamplers.0.conv.bias", "down_blocks.0.attentions.1.norm.weight",
    ):  # fmt: skip
        assert name in names


BROKEN = {
    "missing": (lambda s, n: s.pop(n), "conv_out.bias is missing"),
    "unknown": (lambda s, n: s.update({"conv_out.extra": s[n]}), "conv_out.extra is unknown"),
    "shape": (lambda s, n: s.update({n: torch.zeros(5)}), "conv_out.bias is .5,., .* .4,."),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_anything_that_does_not_fit_is_refused_and_nothing_loaded(plain, unet, broken):
    change, message = BROKEN[broken]
    inflate(unet, TUNE_A_VIDEO)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    state = published(plain)
    change(state, "conv_out.bias")
    with pytest.raises(ValueError, match=f"tune-a-video: {message} .1 in all"):
        load_published(unet, state)
    assert all(torch.equal(t, before[n]) for n, t in unet.state_dict().items())


@pytest.mark.parametrize("recipe", [EI2, FRAME_BY_FRAME], ids=lambda r: r.name)
def test_another_recipe_is_refused(plain, unet, recipe):
    with (
        inflate(unet, recipe),
        pytest.raises(ValueError, match=rf"recipe {recipe.name}: .* in all\)"),
    ):
        load_published(unet, published(plain))


def test_a_unet_that_is_not_inflated_is_refused(plain, unet):
    with pytest.raises(ValueError, match="inflate the UNet"):
        load_published(unet, published(plain))
    with install(unet, TUNE_A_VIDEO.pattern), pytest.raises(ValueError, match="inflate the UNet"):
        load_published(unet, published(plain))


def test_removal_restores_the_weights_that_were_there(plain, unet):
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    with inflate(unet, TUNE_A_VIDEO):
        load_published(unet, published(plain))
        assert not torch.equal(unet.conv_in.weight, before["conv_in.weight"])
    after = unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
