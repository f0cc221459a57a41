"""The processors against diffusers' own, and every trap of its processor contract."""

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from diffusers.models.attention_processor import Attention, AttnProcessor2_0, SpatialNorm
from tiny_unets import LogLines, assert_rounding, clip_inputs, tiny_unet
from tiny_unets import run_installed as run

from tvkernels import FramePattern, install
from tvkernels.processors import (
    Clip,
    FrameAttnProcessor,
    TemporalAttnProcessor,
    TextAttnProcessor,
)

OWN = FramePattern.own()
PREVIOUS = FramePattern.first_previous()
SD15_LAYERS = [(64, 320), (32, 640), (16, 1280), (8, 1280)]
LAYER_VARIANTS = {
    "group_norm": {"norm_num_groups": 8},
    "qk_norm": {"qk_norm": "layer_norm"},
    "qk_rms_norm": {"qk_norm": "rms_norm"},
    "bias": {"bias": True},
    "residual": {"residual_connection": True},
    "rescale": {"residual_connection": True, "rescale_output_factor": 1.7},
    "unscaled": {"scale_qk": False},
    "everything": {
        "norm_num_groups": 8,
        "qk_norm": "layer_norm",
        "bias": True,
        "residual_connection": True,
        "rescale_output_factor": 0.6,
    },
}


@pytest.fixture
def unet():
    return tiny_unet()


def attention(dim=32, heads=4, seed=0, **options):
    torch.manual_seed(seed)
    options = {"query_dim": dim, "heads": heads, "dim_head": dim // heads, **options}
    layer = Attention(**options).eval()
    for name, parameter in layer.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1.0, 0.3)
    return layer


def both(layer, processor, *args, **kwargs):
    """The layer's output with its own processor and with ours."""
    with torch.no_grad():
        expected = layer(*args, **kwargs)
        layer.set_processor(processor)
        return layer(*args, **kwargs), expected


# One layer against diffusers' own processor.


@pytest.mark.parametrize(("side", "dim"), SD15_LAYERS)
def test_own_frames_equal_diffusers_at_every_sd15_layer(side, dim):
    layer = attention(dim, 8)
    x = torch.randn(1 if side == 64 else 2, side * side, dim)
    processor = FrameAttnProcessor(OWN, Clip())
    assert type(layer.processor) is AttnProcessor2_0
    assert_rounding(*both(layer, processor, x), factor=8)


@pytest.mark.parametrize("variant", LAYER_VARIANTS)
@pytest.mark.parametrize("shape", [(3, 20, 32), (3, 32, 4, 5)], ids=["tokens", "picture"])
def test_layer_variants_equal_diffusers(variant, shape):
    layer = attention(**LAYER_VARIANTS[variant])
    assert_rounding(*both(layer, FrameAttnProcessor(), torch.randn(shape)), factor=16)


def test_spatial_norm_takes_the_time_embedding():
    layer = attention(spatial_norm_dim=6)
    assert isinstance(layer.spatial_norm, SpatialNorm)
    x, temb = torch.randn(3, 32, 4, 5), torch.randn(3, 6, 4, 5)
    actual, expected = both(layer, FrameAttnProcessor(), x, temb=temb)
    assert_rounding(actual, expected, factor=16)


@pytest.mark.parametrize("norm", [None, "layer_norm"])
def test_text_equals_diffusers_with_text_repeated(norm):
    layer = attention(cross_attention_dim=24, cross_attention_norm=norm)
    x, text = torch.randn(6, 20, 32), torch.randn(2, 5, 24)
    with torch.no_grad():
        expected = layer(x, text.repeat_interleave(3, 0))
        layer.set_processor(TextAttnProcessor(Clip(3)))
        assert_rounding(layer(x, text), expected, factor=8)
        assert_rounding(layer(x, text.repeat_interleave(3, 0)), expected, factor=8)


@pytest.mark.parametrize("texts", [1, 3, 4, 5])
def test_texts_that_fit_neither_clips_nor_images_are_refused(texts):
    layer = attention(cross_attention_dim=24)
    layer.set_processor(TextAttnProcessor(Clip(4)))
    with pytest.raises(ValueError, match=f"{texts} texts for 8 images in 2 clips"):
        layer(torch.randn(8, 20, 32), torch.randn(texts, 5, 24))


def test_temporal_layers_equal_diffusers():
    layer = attention()
    x = torch.randn(10, 3, 32)
    assert_rounding(*both(layer, TemporalAttnProcessor(), x), factor=8)


def test_frames_are_read_as_the_pattern_says():
    """{0, f - 1} by hand: gather, concatenate, diffusers' own layer."""
    layer, x = attention(), torch.randn(6, 20, 32)
    clips = x.unflatten(0, (2, 3))
    rows = [torch.cat([clips[:, 0], clips[:, max(f - 1, 0)]], 1) for f in range(3)]
    with torch.no_grad():
        expected = torch.stack([layer(clips[:, f], rows[f]) for f in range(3)], 1).flatten(0, 1)
        layer.set_processor(FrameAttnProcessor(PREVIOUS, Clip(3)))
        assert_rounding(layer(x), expected, factor=8)


# The processor contract.


@pytest.mark.parametrize("kind", [FrameAttnProcessor, TextAttnProcessor, TemporalAttnProcessor])
def test_classes_are_constructible_without_arguments(kind):
    """`load_ip_adapter` makes new ones with `type(processor)()`."""
    x = torch.randn(2, 6, 32)
    assert_rounding(*both(attention(), kind(), x), factor=8)


@pytest.mark.parametrize("kind", [FrameAttnProcessor, TextAttnProcessor, TemporalAttnProcessor])
def test_num_frames_is_a_named_argument(kind):
    """diffusers drops keywords that are not in the signature."""
    layer = attention()
    layer.set_processor(kind())
    with LogLines() as lines:
        layer(torch.randn(2, 6, 32), num_frames=2)
    assert not lines


def test_num_frames_of_the_call_reaches_a_processor_without_a_handle():
    layer, x = attention(), torch.randn(4, 6, 32)
    layer.set_processor(FrameAttnProcessor(PREVIOUS))
    whole, halves = layer(x), layer(x, num_frames=2)
    assert torch.equal(whole[:2], halves[:2])
    assert not torch.allclose(whole[2:], halves[2:])


@pytest.mark.parametrize("kind", [FrameAttnProcessor, TextAttnProcessor, TemporalAttnProcessor])
def test_attention_masks_are_refused(kind):
    layer = attention()
    layer.set_processor(kind())
    with pytest.raises(ValueError, match="cannot honour an attention_mask"):
        layer(torch.randn(2, 6, 32), attention_mask=torch.zeros(2, 1, 6))


def test_frame_processors_refuse_cross_attention():
    layer = attention(cross_attention_dim=24)
    layer.set_processor(FrameAttnProcessor())
    with pytest.raises(ValueError, match="self-attention layers only"):
        layer(torch.randn(2, 6, 32), torch.randn(2, 5, 24))


def test_set_attention_backend_does_not_claim_our_processors(unet):
    """It marks processors that declare `_attention_backend`; ours would ignore the mark."""
    if not hasattr(unet, "set_attention_backend"):
        pytest.skip("this diffusers has no set_attention_backend")
    with install(unet, OWN) as handle:
        unet.set_attention_backend("native")
        processors = handle.processors.values()
        assert not any(hasattr(p, "_attention_backend") for p in processors)


def test_projections_are_called_as_modules():
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x):
            Counting.calls += 1
            return super().forward(x)

    layer = attention()
    for name in ("to_q", "to_k", "to_v"):
        setattr(layer, name, Counting(32, 32, bias=False))
    layer.to_out[0] = Counting(32, 32)
    layer.set_processor(FrameAttnProcessor())
    layer(torch.randn(2, 6, 32))
    assert Counting.calls == 4


def test_lora_changes_the_output_as_with_stock_processors(unet):
    peft = pytest.importorskip("peft")
    sample, t, text = clip_inputs()
    plain = run(unet, sample, t, text, None)
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(3)
    unet.add_adapter(config)
    expected = run(unet, sample, t, text, None)
    assert not torch.allclose(plain, expected, rtol=1e-3)
    with install(unet, OWN):
        assert_rounding(run(unet, sample, t, text), expected)


def test_lora_added_after_installing_counts_too(unet):
    peft = pytest.importorskip("peft")
    sample, t, text = clip_inputs()
    with install(unet, OWN):
        config = peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
        unet.add_adapter(config)
        patched = run(unet, sample, t, text)
    assert_rounding(patched, run(unet, sample, t, text, None))


def test_callers_dicts_are_left_alone(unet):
    sample, t, text = clip_inputs()
    patterns, kwargs = {"up_blocks": OWN}, {"num_frames": 3}
    processors = dict(unet.attn_processors)
    with install(unet, patterns):
        unet(sample, t, text.repeat_interleave(3, 0), cross_attention_kwargs=kwargs)
    assert patterns == {"up_blocks": OWN} and kwargs == {"num_frames": 3}
    assert dict(unet.attn_processors) == processors


def test_stock_cross_attention_gets_no_unknown_keyword(unet):
    sample, t, text = clip_inputs()
    with install(unet, OWN), LogLines() as lines:
        run(unet, sample, t, text)
    assert not lines
