"""Inflation: what a recipe computes, what it tunes, and that removal leaves no trace."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from tiny_unets import (
    MOTION,
    SD15,
    VIDEO,
    assert_rounding,
    build,
    clip_inputs,
    look,
    loss_of,
    run_clip,
    seeded,
    tiny_unet,
)

from tvkernels import FramePattern, inflate, install, recipes
from tvkernels.nn import (
    ClipGroupNorm,
    ShiftRestrictedTemporalAttention,
    SpectralLinear,
    TemporalAttention,
)
from tvkernels.recipes import ABLATIONS, EI2, FRAME_BY_FRAME, RECIPES, TUNE_A_VIDEO, TemporalModule

TUNED = [TUNE_A_VIDEO, EI2]
EVERY = {**RECIPES, **ABLATIONS}


def by_name(recipe):
    return recipe.name


@pytest.fixture
def unet():
    return tiny_unet()


def snapshot(unet):
    """All that removal must restore, with tensors copied."""
    return {
        "state": {name: tensor.clone() for name, tensor in unet.state_dict().items()},
        "parameters": {n: (id(p), p.requires_grad) for n, p in unet.named_parameters()},
        "processors": dict(unet.attn_processors),
        "modules": {name: (id(m), type(m), m.training) for name, m in unet.named_modules()},
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules()],
        "attributes": set(vars(unet)),
    }


def assert_same(before, after):
    states = before.pop("state"), after.pop("state")
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert before == after


def tune(unet, handle, steps=1, rate=1e-2):
    """A few AdamW steps on the tuned parameters; the gradients of the last one stay."""
    optimizer = torch.optim.AdamW(handle.tuned_parameters().values(), lr=rate)
    inputs = clip_inputs(1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(unet, *inputs).backward()
        optimizer.step()


def effective(layer):
    """The weight that a SpectralLinear multiplies by, read off its output."""
    with torch.no_grad():
        bias = 0 if layer.bias is None else layer.bias
        return (layer(torch.eye(layer.in_features)) - bias).T


def spectral_layers(unet):
    return [m for m in unet.modules() if isinstance(m, SpectralLinear)]


# What is computed.


def test_frame_by_frame_equals_the_stock_unet_with_text_repeated(unet):
    sample, t, text = clip_inputs()
    with torch.no_grad():
        expected = unet(sample, t, text.repeat_interleave(3, 0)).sample
    with inflate(unet, FRAME_BY_FRAME):
        assert_rounding(look(unet, sample, t, text), expected)
        assert_rounding(look(unet, sample, t, text.repeat_interleave(3, 0)), expected)


def test_text_is_projected_once_for_all_frames(unet):
    sample, t, text = clip_inputs(2, 3, tokens=7)
    rows = []
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            module.register_forward_hook(lambda m, args, out: rows.append(out.shape[:2]))
    with inflate(unet, EI2):
        look(unet, sample, t, text)
    assert len(rows) == 20 and set(rows) == {(2, 7)}


@pytest.mark.parametrize("texts", [1, 3])
def test_texts_that_fit_neither_clips_nor_images_are_refused(unet, texts):
    sample, t, text = clip_inputs()
    with inflate(unet, EI2), pytest.raises(ValueError, match=f"{texts} texts for 6 images in 2"):
        look(unet, sample, t, text[:1].expand(texts, -1, -1))


@pytest.mark.parametrize("recipe", EVERY.values(), ids=by_name)
def test_every_recipe_inflates_runs_and_trains(unet, recipe):
    before = snapshot(unet)
    handle = inflate(unet, recipe, generator=seeded())
    outputs = []
    for size in ((8, 8), (5, 9)):
        sample, t, text = clip_inputs(size=size)
        outputs.append(look(unet, sample, t, text))
        assert outputs[-1].shape == sample.shape and torch.isfinite(outputs[-1]).all()
    if recipe.tuned:
        tune(unet, handle)
        assert not torch.equal(look(unet, *clip_inputs(size=(5, 9))), outputs[-1])
    handle.remove()
    assert_same(before, snapshot(unet))


def test_recipes_that_differ_compute_different_things(unet):
    outputs = {}
    for name, recipe in EVERY.items():
        with inflate(unet, recipe, generator=seeded()):
            for module in unet.modules():
                if isinstance(module, TemporalAttention):
                    nn.init.normal_(module.to_out[0].weight, std=0.3, generator=seeded(2))
                if isinstance(module, nn.Conv3d):
                    nn.init.normal_(module.weight, std=0.1, generator=seeded(3))
            outputs[name] = look(unet, *clip_inputs())
    # A fresh LayerNorm's learnable weights are still one and zero.
    assert_rounding(outputs.pop("tav-layer-norm-plain"), outputs["tune-a-video"])
    names = list(outputs)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert (outputs[a] - outputs[b]).abs().max() > 1e-4, (a, b)


def test_two_samples_do_not_mix(unet):
    sample, t, text = clip_inputs(2)
    with inflate(unet, EI2, generator=seeded()):
        both = look(unet, sample, t, text)
        assert_rounding(both[:3], look(unet, sample[:3], t, text[:1]))
        assert_rounding(both[3:], look(unet, sample[3:], t, text[1:]))


def test_added_modules_keep_the_unets_mode(unet):
    for training in (True, False):
        with inflate(unet.train(training), TUNE_A_VIDEO):
            assert all(module.training == training for module in unet.modules())


def test_clip_wide_norms_are_the_resnets_and_the_last_one(unet):
    with inflate(unet, TUNE_A_VIDEO):
        for name, module in unet.named_modules():
            if isinstance(module, nn.GroupNorm):
                wide = ".resnets." in name or name == "conv_norm_out"
                assert isinstance(module, ClipGroupNorm) == wide, name


def test_clip_group_norm_pools_over_frames():
    norm = nn.GroupNorm(4, 8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    from tvkernels.processors import Clip

    x = torch.randn(6, 8, 3, 5)
    expected = norm(x.unflatten(0, (2, 3)).transpose(1, 2)).transpose(1, 2).flatten(0, 1)
    assert_rounding(ClipGroupNorm(norm, Clip(3))(x), expected, factor=8)


# How the added modules start.


def test_the_same_generator_seed_gives_the_same_weights(unet):
    before = torch.get_rng_state()
    states = []
    for seed in (4, 4, 5):
        with inflate(unet, EI2, generator=seeded(seed)) as handle:
            states.append(handle.tuned_state())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    added = [name for name in states[0] if name.endswith("attn_temp.to_q.weight")]
    assert added and not any(torch.equal(states[0][name], states[2][name]) for name in added)
    values = [states[0][name] for name in added if states[0][name].shape == (64, 64)]
    assert not torch.equal(values[0], values[1])


def test_tune_a_video_starts_with_zero_weights_but_random_biases(unet):
    """So the inflated UNet is not an identity: its attention adds a constant to every token."""
    with inflate(unet, TUNE_A_VIDEO, generator=seeded()):
        modules = [m for m in unet.modules() if isinstance(m, TemporalAttention)]
        assert len(modules) == 10
        for module in modules:
            out = module.to_out[0]
            assert not out.weight.any() and out.bias.all()
            assert out.bias.abs().max() <= out.in_features**-0.5
            assert type(module.norm) is nn.LayerNorm and module.norm.weight.requires_grad
            z = torch.randn(2, 3, 4, out.in_features)
            assert_rounding(module(z), z + out.bias, factor=2)


def test_stam_starts_with_zero_biases_and_norms_of_one(unet):
    with inflate(unet, EI2, generator=seeded()):
        modules = [m for m in unet.modules() if isinstance(m, TemporalAttention)]
        assert len(modules) == 10
        for module in modules:
            assert type(module) is ShiftRestrictedTemporalAttention
            out, v = module.to_out[0], module.to_v
            assert not out.bias.any() and out.weight.all() and v.bias is None
            for layer in (out, v):
                sigma = np.linalg.svd(effective(layer).double().numpy(), compute_uv=False)[0]
                assert abs(sigma - 1) < 1e-5
                assert torch.allclose(layer.fold(), effective(layer), atol=1e-6)
            assert type(module.to_q) is type(module.to_k) is nn.Linear
            z = torch.randn(2, 3, 4, out.in_features)
            assert not torch.allclose(module(z), z, atol=1e-3)
            still = z[:, :1].expand(-1, 3, -1, -1)
            assert_rounding(module(still), still)


def test_stam_equals_its_formula_written_out():
    torch.manual_seed(0)
    module, z = ShiftRestrictedTemporalAttention(8, 2), torch.randn(2, 3, 4, 8)
    nn.init.normal_(module.to_out[0].bias)
    with torch.no_grad():
        centered = z - z.mean(1, keepdim=True)
        w_v, w_out = (
            w / torch.linalg.matrix_norm(w, 2)
            for w in (module.to_v.weight, module.to_out[0].weight)
        )
        q, k, v = (
            (centered @ w.T).unflatten(-1, (2, 4)).permute(0, 2, 3, 1, 4)
            for w in (module.to_q.weight, module.to_k.weight, w_v)
        )
        attended = ((q @ k.mT / 2).softmax(-1) @ v).permute(0, 3, 1, 2, 4).flatten(3)
        expected = z + attended @ w_out.T + module.to_out[0].bias
        assert_rounding(module(z), expected, factor=16)


def test_recipes_that_cannot_be_built_leave_the_unet_as_it_was(unet):
    before = snapshot(unet)
    for bad in (TemporalModule(spectral=True), TemporalModule("centering", True, "zero_weight")):
        with pytest.raises(ValueError, match="spectral norms need centering and a zero bias"):
            inflate(unet, replace(EI2, temporal=bad))
        assert_same({**before}, snapshot(unet))
    assert not hasattr(unet, "_tvkernels_handle")


# Tuning.


@pytest.mark.parametrize("recipe", TUNED, ids=by_name)
def test_gradients_reach_exactly_the_tuned_parameters(unet, recipe):
    handle = inflate(unet, recipe, generator=seeded())
    tune(unet, handle, steps=2)
    tuned = handle.tuned_parameters()
    for name, parameter in unet.named_parameters():
        wanted = ".attn_temp." in name or name.endswith(("attn1.to_q.weight", "attn2.to_q.weight"))
        assert parameter.requires_grad == wanted == (name in tuned), name
        assert (parameter.grad is not None) == wanted, name
        if wanted:
            assert torch.isfinite(parameter.grad).all() and parameter.grad.any(), name
    assert len(tuned) == 20 + 10 * (7 if recipe is TUNE_A_VIDEO else 5)


@pytest.mark.parametrize("recipe", TUNED, ids=by_name)
def test_removal_restores_bit_for_bit(unet, recipe):
    unet.conv_in.requires_grad_(False)
    inputs = clip_inputs()
    expected, before = unet(*inputs[:2], inputs[2].repeat(3, 1, 1)).sample, snapshot(unet)
    handle = inflate(unet, recipe, generator=seeded())
    tune(unet, handle)
    state = unet.state_dict()
    changed = [n for n, x in before["state"].items() if not torch.equal(state[n], x)]
    assert len(changed) == 20 and all(n.endswith("to_q.weight") for n in changed)
    handle.remove()
    assert_same(before, snapshot(unet))
    assert all(p.grad is None for p in unet.parameters())
    assert torch.equal(unet(*inputs[:2], inputs[2].repeat(3, 1, 1)).sample, expected)


def test_removal_after_a_lora_was_added_restores_the_base_weights(unet):
    peft = pytest.importorskip("peft")
    before = {n: x.clone() for n, x in unet.state_dict().items()}
    handle = inflate(unet, EI2, generator=seeded())
    tune(unet, handle)
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    handle.remove()
    after = {n.replace(".base_layer", ""): x for n, x in unet.state_dict().items()}
    assert all(torch.equal(after[n], x) for n, x in before.items())


def test_removal_keeps_a_lora_that_was_fused_into_what_is_tuned(unet):
    peft = pytest.importorskip("peft")
    plain = {n: x.clone() for n, x in unet.state_dict().items()}
    handle = inflate(unet, TUNE_A_VIDEO, generator=seeded())
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["attn2.to_q"], init_lora_weights=False))
    unet.fuse_lora()
    unet.unload_lora()
    fused = handle.tuned_state()
    twin = copy.deepcopy(unet)
    handle.remove()
    after = unet.state_dict()
    wanted = {n: fused.get(n, x) for n, x in plain.items()}
    name = next(n for n in fused if n.endswith("attn2.to_q.weight"))
    assert all(torch.equal(after[n], x) for n, x in wanted.items())
    assert not torch.equal(after[name], plain[name])
    with torch.no_grad():
        twin.get_parameter(name).add_(1.0)
    twin._tvkernels_handle.remove()  # what was tuned goes, in a copy too
    assert torch.equal(twin.state_dict()[name], plain[name])


def test_two_recipes_in_turn_on_one_unet(unet):
    inputs = clip_inputs()
    with inflate(unet, EI2, generator=seeded()) as handle:
        first = look(unet, *inputs)
        with pytest.raises(RuntimeError, match="already patched"):
            inflate(unet, TUNE_A_VIDEO)
        tune(unet, handle)
    with inflate(unet, TUNE_A_VIDEO, generator=seeded()) as handle:
        tune(unet, handle)
    with inflate(unet, EI2, generator=seeded()):
        assert torch.equal(look(unet, *inputs), first)


@pytest.mark.parametrize("recipe", TUNED, ids=by_name)
def test_tuned_state_makes_the_round_trip(unet, recipe):
    inputs = clip_inputs()
    with inflate(unet, recipe, generator=seeded()) as handle:
        tune(unet, handle, steps=2)
        state, expected = handle.tuned_state(), look(unet, *inputs)
    spectral = {n for n in state if n.endswith((".u", ".v"))}
    assert len(spectral) == (40 if recipe is EI2 else 0)
    with inflate(unet, recipe, generator=seeded(7)) as handle:
        assert not torch.allclose(look(unet, *inputs), expected, atol=1e-4)
        assert state.keys() - spectral == handle.tuned_parameters().keys()
        handle.load_tuned_state(state)
        assert torch.equal(look(unet, *inputs), expected)
        tune(unet, handle)
        handle.load_tuned_state(state)
        assert torch.equal(look(unet, *inputs), expected)


def test_tuned_state_of_another_recipe_is_refused(unet):
    with inflate(unet, EI2) as handle:
        state = handle.tuned_state()
        wrong = {**state, "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight": state[
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
        ]}  # fmt: skip
        with pytest.raises(ValueError, match="mid_block.*attn1.to_q.weight differs .1 in all"):
            handle.load_tuned_state(wrong)
    with inflate(unet, TUNE_A_VIDEO) as handle, pytest.raises(ValueError, match="tune-a-video"):
        handle.load_tuned_state(state)


# Spectral norms while training.


def test_power_iteration_moves_once_per_training_step_and_not_in_sampling(unet):
    handle = inflate(unet, EI2, generator=seeded())
    layers = spectral_layers(unet)
    assert len(layers) == 20

    def vectors():
        return [layer.u.clone() for layer in layers]

    start = vectors()
    look(unet, *clip_inputs())
    assert all(torch.equal(a, b) for a, b in zip(start, vectors(), strict=True))
    expected = []
    for layer in layers:
        u = layer.u / layer.u.norm()
        v = layer.weight.T @ u
        u = layer.weight @ (v / v.norm())
        expected.append(u / u.norm())
    tune(unet, handle)
    moved = vectors()
    assert not any(torch.equal(a, b) for a, b in zip(start, moved, strict=True))
    for a, b in zip(expected, moved, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_training_divides_by_the_power_iterations_estimate():
    """u and v held constant: sigma = u^T W v, and gradients reach the weight through it."""
    torch.manual_seed(0)
    layer, x = SpectralLinear(6, 5), torch.randn(3, 6)
    layer.power_iterate()
    weight = layer.weight.detach().clone().requires_grad_()
    expected = x @ (weight / (layer.u @ weight @ layer.v)).T + layer.bias.detach()
    actual = layer(x)
    assert_rounding(actual, expected, factor=8)
    grads = [torch.autograd.grad(y.square().sum(), w)[0]
             for y, w in ((actual, layer.weight), (expected, weight))]  # fmt: skip
    assert_rounding(*grads, factor=16)


def test_sigma_is_exact_again_after_training(unet):
    handle = inflate(unet, EI2, generator=seeded())
    look(unet, *clip_inputs())
    tune(unet, handle, steps=3, rate=0.1)
    for layer in spectral_layers(unet):
        sigma = np.linalg.svd(effective(layer).double().numpy(), compute_uv=False)[0]
        assert abs(sigma - 1) < 1e-5


def test_sigma_follows_weights_however_they_are_written():
    layer = SpectralLinear(6, 5)

    def exact():
        return torch.linalg.matrix_norm(layer.weight.detach().float(), 2)

    with torch.no_grad():
        layer(torch.zeros(6))
        layer.weight.mul_(3)  # an optimiser's step after an evaluation
        assert torch.allclose(layer.sigma, exact())
        layer.load_state_dict({**layer.state_dict(), "weight": torch.randn(5, 6)})
        assert torch.allclose(layer.sigma, exact())
        layer.weight = nn.Parameter(torch.randn(5, 6))
        assert torch.allclose(layer.sigma, exact())
        layer.half()
        assert layer.sigma.dtype == layer.u.dtype == torch.float32
        assert torch.allclose(layer.sigma, exact())


def test_two_training_passes_may_share_one_backward(unet):
    """The second moves u and v, which the first one's backward pass still reads."""
    inflate(unet, EI2, generator=seeded())
    inputs = clip_inputs(1)
    (loss_of(unet, *inputs) + loss_of(unet, *inputs)).backward()


@pytest.mark.parametrize("recipe", TUNED, ids=by_name)
def test_gradient_checkpointing_changes_nothing(unet, recipe):
    results = []
    for checkpointing in (False, True):
        with inflate(unet, recipe, generator=seeded()) as handle:
            unet.train()
            if checkpointing:
                unet.enable_gradient_checkpointing()
            calls = []
            block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
            counter = block.attn_temp.register_forward_pre_hook(lambda *_, c=calls: c.append(1))
            for _ in range(2):
                unet.zero_grad()
                loss = loss_of(unet, *clip_inputs(1))
                loss.backward()
            counter.remove()
            assert len(calls) == (4 if checkpointing else 2)
            grads = {n: p.grad.clone() for n, p in handle.tuned_parameters().items()}
            results.append((loss.detach(), grads, [m.u.clone() for m in spectral_layers(unet)]))
        unet.disable_gradient_checkpointing()
        unet.eval()
    (loss, grads, vectors), (other_loss, other_grads, other_vectors) = results
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(a, b) for a, b in zip(vectors, other_vectors, strict=True))
    for name, grad in grads.items():
        assert_rounding(other_grads[name], grad)


# What is not for us.


def test_wrong_models_are_refused():
    for name, config in (("UNetMotionModel", MOTION), ("UNet3DConditionModel", VIDEO)):
        with pytest.raises(TypeError, match=f"of an SD-1.x model, got {name}"):
            inflate(build(name, config), EI2)
    sdxl = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    }  # fmt: skip
    for changes in (sdxl, {"num_class_embeds": 3}):
        unet = tiny_unet(**changes)
        before = snapshot(unet)
        with pytest.raises(TypeError, match=f"got one with .*{next(iter(changes))}"):
            inflate(unet, EI2)
        assert_same(before, snapshot(unet))
    with pytest.raises(TypeError, match="got Linear"):
        inflate(nn.Linear(2, 2), EI2)


def test_weights_cast_layer_by_layer_are_refused():
    unet = tiny_unet()
    unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with pytest.raises(TypeError, match="without enable_layerwise_casting"):
        inflate(unet, FRAME_BY_FRAME)


@pytest.mark.parametrize("layer", ["attn1", "attn2"])
def test_foreign_processors_are_refused(unet, layer):
    from diffusers.models.attention_processor import AttnProcessor2_0

    foreign = type("IPAdapterAttnProcessor2_0", (AttnProcessor2_0,), {})()
    getattr(unet.mid_block.attentions[0].transformer_blocks[0], layer).set_processor(foreign)
    before = snapshot(unet)
    with pytest.raises(RuntimeError, match=f"mid_block.*{layer} holds IPAdapterAttnProcessor2_0"):
        inflate(unet, EI2)
    assert_same(before, snapshot(unet))


def test_a_unet_with_installed_processors_is_refused(unet):
    with install(unet, FramePattern.own()), pytest.raises(RuntimeError, match="already patched"):
        inflate(unet, EI2)


def test_replacing_our_processors_is_noticed_at_the_next_call(unet):
    from diffusers.models.attention_processor import AttnProcessor2_0

    inflate(unet, EI2)
    unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(AttnProcessor2_0())
    with pytest.raises(RuntimeError, match="mid_block.*attn2 now holds AttnProcessor2_0"):
        look(unet, *clip_inputs())


def test_recipes_are_data():
    assert recipes.RECIPES["ei2"] is EI2 and EI2.pattern == FramePattern.fine_coarse(2)
    assert TUNE_A_VIDEO.pattern == FramePattern.first_previous()
    own = replace(EI2, name="mine", pattern=(("up_blocks", FramePattern.first()),))
    unet = tiny_unet()
    with inflate(unet, own) as handle:
        frames = [n for n in handle.layers if n.endswith("attn1")]
        assert frames and all(n.startswith("up_blocks") for n in frames)
        look(unet, *clip_inputs())


@pytest.mark.slow
def test_a_full_size_sd15_unet_takes_a_training_step():
    unet = build("UNet2DConditionModel", SD15)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    handle = inflate(unet, EI2, generator=seeded())
    assert sum(n.endswith("attn1") for n in handle.layers) == 16
    optimizer = torch.optim.AdamW(handle.tuned_parameters().values(), lr=3e-5)
    sample, text = torch.randn(2, 4, 64, 64), torch.randn(1, 77, 768)
    before = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.clone()
    loss = run_clip(unet, sample, torch.tensor(500), text, 2).square().mean()
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    assert all(p.grad.any() for p in handle.tuned_parameters().values())
    handle.remove()
    after = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    assert torch.equal(before, after)


def test_a_feed_forward_in_parts_is_the_same_with_less_memory(monkeypatch):
    from tvkernels import _inflate
    from tvkernels.benchmarks.timing import peak_bytes

    unet = tiny_unet()
    handle = inflate(unet, recipes.FRAME_BY_FRAME)
    ff = next(m.ff for n, m in unet.named_modules() if type(m).__name__ == "BasicTransformerBlock")
    x = torch.randn(12, 64, ff.net[2].out_features)
    found, peaks = [], []
    for rows in (12 * 64, 128):
        monkeypatch.setitem(_inflate.ROWS, "cpu", rows)
        with torch.no_grad():
            found.append(ff(x))
            peaks.append(peak_bytes(lambda: ff(x), x.device))
    assert torch.equal(*found)
    assert peaks[1] < peaks[0] / 2
    monkeypatch.setitem(_inflate.ROWS, "cpu", 128)
    with torch.enable_grad():
        assert peak_bytes(lambda: ff(x), x.device) >= peaks[0], (
            "what is differentiated stays whole"
        )
    handle.remove()
    assert "forward" not in vars(ff)
