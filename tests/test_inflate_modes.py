"""Inflated UNets under LoRA, autocast, other dtypes, torch.compile and deep copies."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from tiny_unets import (
    assert_rounding,
    clip_inputs,
    look,
    loss_of,
    one_level_unet,
    seeded,
    tiny_unet,
)

from tvkernels import inflate
from tvkernels.nn import SpectralLinear, TemporalAttention
from tvkernels.recipes import EI2, TCVE, TUNE_A_VIDEO

TUNED = [TUNE_A_VIDEO, EI2, TCVE]


@pytest.fixture
def unet():
    return tiny_unet()


@pytest.mark.parametrize("recipe", TUNED, ids=lambda recipe: recipe.name)
def test_lora_on_the_added_attention_counts(unet, recipe):
    peft = pytest.importorskip("peft")
    with inflate(unet, recipe, generator=seeded()):
        for module in unet.modules():
            if isinstance(module, TemporalAttention):
                nn.init.normal_(module.to_out[0].weight, std=0.3, generator=seeded(2))
        plain = look(unet, *clip_inputs())
        targets = ["attn_temp.to_q", "attn_temp.to_v", "attn_temp.to_out.0"]
        unet.add_adapter(peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        assert (look(unet, *clip_inputs()) - plain).abs().max() > 1e-3
        unet.disable_adapters()
        assert_rounding(look(unet, *clip_inputs()), plain)


@pytest.mark.parametrize("recipe", TUNED, ids=lambda recipe: recipe.name)
def test_trains_under_autocast(unet, recipe):
    inputs = clip_inputs(1)
    with inflate(unet, recipe, generator=seeded()) as handle:
        expected = look(unet, *inputs)
        with torch.autocast("cpu", torch.bfloat16):
            assert (look(unet, *inputs) - expected).abs().max() < 0.1
            loss = loss_of(unet, *inputs)
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in handle.tuned_parameters().values())


@pytest.mark.parametrize("recipe", TUNED, ids=lambda recipe: recipe.name)
def test_follows_the_unets_dtype(unet, recipe):
    sample, t, text = clip_inputs()
    for first in (False, True):
        if first:
            unet.bfloat16()
        with inflate(unet, recipe, generator=seeded()):
            unet.bfloat16()
            out = look(unet, sample.bfloat16(), t, text.bfloat16())
            assert out.dtype == torch.bfloat16 and out.shape == sample.shape
            assert torch.isfinite(out).all()


def test_compiles_without_graph_breaks_in_sampling_and_in_training():
    unet, results = one_level_unet(), []
    torch._dynamo.reset()
    compiled = torch.compile(unet, backend="aot_eager", fullgraph=True)
    for model in (unet, compiled):
        with inflate(model, EI2, generator=seeded()) as handle:
            loss = loss_of(model, *clip_inputs())
            loss.backward()
            vectors = [m.u.clone() for m in unet.modules() if isinstance(m, SpectralLinear)]
            gradients = [p.grad for p in handle.tuned_parameters().values()]
            results.append([look(model, *clip_inputs()), loss.detach(), *vectors, *gradients])
    for actual, expected in zip(*reversed(results), strict=True):
        assert_rounding(actual, expected)


def test_deep_copies_are_independent():
    unet, inputs = one_level_unet(), clip_inputs()
    handle = inflate(unet, EI2, generator=seeded())
    expected, twin = look(unet, *inputs), copy.deepcopy(unet)
    handle.remove()
    assert torch.equal(look(twin, *inputs), expected)
    twin._tvkernels_handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())
    assert all(
        torch.equal(a, b) for a, b in zip(twin.parameters(), unet.parameters(), strict=True)
    )
