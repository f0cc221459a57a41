"""`install` on each family of diffusers' models: served by what tokens are, or refused."""

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from tiny_unets import MOTION, TINY, VIDEO, assert_rounding, build

from tvkernels import FramePattern, install
from tvkernels.processors import FrameAttnProcessor, TemporalAttnProcessor

FRAMES = 14  # Stable Video Diffusion's
SMALL = {"block_out_channels": (32, 32), "layers_per_block": 1}
LEVELS_2D = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
LEVELS_3D = {
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}
SVD = {
    **SMALL, "sample_size": 8, "in_channels": 8, "cross_attention_dim": 32,
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24,
    "num_attention_heads": 4, "num_frames": FRAMES,
}  # fmt: skip
I2V = {
    **SMALL, **LEVELS_3D, "sample_size": 8, "cross_attention_dim": 32, "attention_head_dim": 8,
    "num_attention_heads": None, "norm_num_groups": 8,
}  # fmt: skip
CONTROL = {
    **{key: value for key, value in TINY.items() if key not in ("up_block_types", "sample_size")},
    **SMALL, "down_block_types": LEVELS_2D["down_block_types"],
    "conditioning_embedding_out_channels": (8, 16),
}  # fmt: skip


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images():
    return draw(FRAMES, 4, 8, 8), torch.tensor(7), draw(FRAMES, 5, 32, seed=2)


def clips():
    return draw(1, 4, FRAMES, 8, 8), torch.tensor(7), draw(1, 5, 32, seed=2)


def call_svd(model):
    added = {"added_time_ids": torch.ones(1, 3)}
    return model(draw(1, FRAMES, 8, 8, 8), torch.tensor(3.0), draw(1, 1, 32, seed=2), **added)


def call_i2vgen(model):
    sample, t, text = clips()
    picture = {"image_latents": draw(1, 4, FRAMES, 8, 8, seed=3), "image_embeddings": draw(1, 32)}
    return model(
        sample, t, torch.tensor([8]), encoder_hidden_states=text, **picture
    )  # fmt: skip


def call_control(model):
    return model(*images(), torch.rand(FRAMES, 3, 16, 16, generator=torch.Generator()))


# Name of the class -> its configuration, a call of it, and how many layers are of which kind.
SERVED = {
    "UNet2DConditionModel": ({**TINY, **SMALL, **LEVELS_2D}, lambda m: m(*images()), (4, 0)),
    "ControlNetModel": (CONTROL, call_control, (2, 0)),
    "UNetMotionModel": (
        {**MOTION, **SMALL},
        lambda m: m(clips()[0], clips()[1], clips()[2].repeat(FRAMES, 1, 1)), (4, 14),
    ),
    "UNet3DConditionModel": ({**VIDEO, **SMALL}, lambda m: m(*clips()), (4, 10)),
    "I2VGenXLUNet": (I2V, call_i2vgen, (4, 11)),
    "UNetSpatioTemporalConditionModel": (SVD, call_svd, (4, 4)),
}  # fmt: skip


def first(out):
    """The last of a ControlNet's features, or the sample."""
    return out[0][-1] if isinstance(out[0], (tuple, list)) else out[0]


@pytest.mark.parametrize("name", SERVED)
def test_layers_are_served_by_what_their_tokens_are(name):
    config, call, counts = SERVED[name]
    model = build(name, config)
    with torch.no_grad():
        expected = first(call(model))
        with install(model, FramePattern.own()) as handle:
            kinds = [type(p) for p in handle.processors.values()]
            assert (kinds.count(FrameAttnProcessor), kinds.count(TemporalAttnProcessor)) == counts
            assert_rounding(first(call(model)), expected)
        with install(model, FramePattern.first()):
            changed = first(call(model))
        assert changed.isfinite().all() and (changed - expected).abs().max() > 1e-4
        assert torch.equal(first(call(model)), expected)


REFUSED = {
    "UNet2DModel": {
        "sample_size": 8, **SMALL, "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    },
    "AutoencoderKL": {"block_out_channels": (32,), "sample_size": 8},
    "AutoencoderKLTemporalDecoder": {"block_out_channels": (32,), "sample_size": 8},
    "AsymmetricAutoencoderKL": {"down_block_out_channels": (32,), "up_block_out_channels": (32,)},
    "DiTTransformer2DModel": {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 1,
        "sample_size": 8,
    },
    "LatteTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 1,
        "sample_size": 8, "patch_size": 2, "cross_attention_dim": 16, "caption_channels": 8,
    },
    "UVit2DModel": {
        "hidden_size": 32, "cond_embed_dim": 32, "encoder_hidden_size": 32,
        "block_out_channels": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
        "block_num_heads": 2, "num_res_blocks": 1, "codebook_size": 16, "vocab_size": 17,
        "micro_cond_encode_dim": 8, "micro_cond_embed_dim": 40,
    },
    "Kandinsky3UNet": {
        "block_out_channels": (32, 32), "layers_per_block": 1, "cross_attention_dim": 32,
        "encoder_hid_dim": 32, "time_embedding_dim": 32, "attention_head_dim": 8, "groups": 8,
    },
    "StableCascadeUNet": {
        "block_out_channels": (32, 32), "num_attention_heads": (2, 2), "conditioning_dim": 32,
        "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1),
        "down_blocks_repeat_mappers": (1, 1), "up_blocks_repeat_mappers": (1, 1),
        "block_types_per_layer": (("SDCascadeAttnBlock",),) * 2, "clip_text_in_channels": 16,
        "clip_text_pooled_in_channels": 16, "clip_image_in_channels": 16,
        "timestep_ratio_embedding_dim": 8,
    },
    "TransformerTemporalModel": {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 32,
    },
    "MotionAdapter": {
        "block_out_channels": (32, 32), "motion_layers_per_block": 1,
        "motion_num_attention_heads": 2,
        "motion_norm_num_groups": 8,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused(name):
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**REFUSED[name])
    before = {n: id(p) for n, p in getattr(model, "attn_processors", {}).items()}
    with pytest.raises((TypeError, ValueError), match=f"(of this|a) {name}.*install serves"):
        install(model, FramePattern.own())
    assert {n: id(p) for n, p in getattr(model, "attn_processors", {}).items()} == before
    assert not model._forward_pre_hooks


def test_clips_that_lie_frames_first_do_not_mix():
    """Stable Video Diffusion's [B, F, C, h, w] under guidance."""
    model = build("UNetSpatioTemporalConditionModel", SVD)
    sample, text, added = draw(2, 3, 8, 8, 8), draw(2, 1, 32, seed=2), torch.ones(2, 3)
    t = torch.tensor(3.0)
    with install(model, FramePattern.first_previous()), torch.no_grad():
        both = model(sample, t, text, added_time_ids=added).sample
        for i in range(2):
            one = model(sample[i : i + 1], t, text[i : i + 1], added_time_ids=added[:1]).sample
            assert_rounding(both[i : i + 1], one)


def test_layers_in_a_module_of_unknown_axes_are_refused():
    """Blocks of frames and of positions are the same class: what is around them tells."""
    model = build("UNet2DConditionModel", {**TINY, **SMALL, **LEVELS_2D})
    place = model.mid_block.attentions[0]
    place.__class__ = type("SomeTransformer", (torch.nn.Module,), {})
    with pytest.raises(TypeError, match="mid_block.*may be positions or frames"):
        install(model, FramePattern.own())
    with install(model, {"up_blocks": FramePattern.own()}):
        pass
