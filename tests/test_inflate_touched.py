"""Inflated UNets that something else touches, before or after: the same result, or a refusal."""

import copy
import pickle
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

import diffusers
from tiny_unets import assert_rounding, clip_inputs, look, seeded, tiny_unet

from tvkernels import inflate
from tvkernels.nn import ClipGroupNorm, TemporalAttention
from tvkernels.recipes import EI2, FRAME_BY_FRAME, TCVE
from tvkernels.runtime import accelerate

TIME = ["time_emb_proj", "linear_1", "linear_2"]
EVERYTHING = [
    *TIME, "to_q", "to_k", "to_v", "to_out.0", "proj", "net.2", "conv1", "conv_in",
    "conv_shortcut",
]  # fmt: skip
TARGETS = {"projections": TIME[:1], "embedding": TIME[1:], "everything": EVERYTHING}
every_recipe = pytest.mark.parametrize(
    "recipe", [FRAME_BY_FRAME, EI2, TCVE], ids=lambda recipe: recipe.name
)


def small_unet():
    """Two levels, one of them without attention."""
    return tiny_unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), block_out_channels=(32, 32),
    )  # fmt: skip


def inflated(recipe=EI2, unet=None):
    """A small UNet whose added modules count for something, and its handle."""
    unet = small_unet() if unet is None else unet
    handle = inflate(unet, recipe, generator=seeded())
    for module in unet.modules():
        if isinstance(module, TemporalAttention):
            nn.init.normal_(module.to_out[0].weight, std=0.3, generator=seeded(2))
        if isinstance(module, nn.Conv3d):
            nn.init.normal_(module.weight, std=0.1, generator=seeded(3))
    return unet, handle


def run(unet, how="called", scale=None):
    """A call as diffusers makes it, or by a runner with what it can work out beforehand."""
    sample, t, text = clip_inputs()
    named = {"num_frames": 3} | ({} if scale is None else {"scale": scale})
    with torch.no_grad():
        if how == "called":
            return unet(sample, t, text, cross_attention_kwargs=named).sample
        runner = accelerate(unet)
        given = sample, runner.times(t[None])[0], runner.text(text)
        return runner(*given, cross_attention_kwargs=named).sample


@cache
def lora(*targets):
    """The state of a LoRA that was trained on the plain UNet."""
    peft = pytest.importorskip("peft")
    unet = small_unet()
    torch.manual_seed(1)
    unet.add_adapter(
        peft.LoraConfig(r=4, lora_alpha=16, target_modules=list(targets), init_lora_weights=False)
    )
    return dict(peft.get_peft_model_state_dict(unet))


def load(unet, state, name="default"):
    unet.load_lora_adapter(dict(state), prefix=None, adapter_name=name)


# Adapters.


@pytest.mark.parametrize("targets", TARGETS)
@every_recipe
def test_a_lora_counts_after_inflation_as_before(recipe, targets):
    state, unet = lora(*TARGETS[targets]), small_unet()
    load(unet, state)
    before, _ = inflated(recipe, unet)
    after, _ = inflated(recipe)
    plain = run(after)
    load(after, state)
    expected = run(before)
    assert (expected - plain).abs().max() > 1e-3
    for how in ("called", "runner"):
        assert_rounding(run(after, how), expected, factor=256)
    assert_rounding(run(before, "runner"), expected, factor=256)


SWITCHES = {
    "off": lambda unet: unet.disable_lora(),
    "weaker": lambda unet: unet.set_adapters(["default"], [0.3]),
    "fused": lambda unet: unet.fuse_lora(lora_scale=0.7),
    "fused and unfused": lambda unet: (unet.fuse_lora(), unet.unfuse_lora()),
    "unloaded": lambda unet: unet.unload_lora(),
    "deleted": lambda unet: unet.delete_adapters(["default"]),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_what_was_worked_out_follows_the_adapters(switch):
    """Rows of time and projected text are older than the change, and so is a spectral norm."""
    unet, _ = inflated()
    sample, t, text = clip_inputs()
    runner = accelerate(unet)
    plain_row, plain_text = runner.times(t[None])[0], runner.text(text)
    halves = plain_text.split(1)
    load(unet, lora(*EVERYTHING))
    row, projected = runner.times(t[None])[0], runner.text(text)
    with_lora = runner(sample, row, projected).sample
    assert_rounding(runner(sample, plain_row, plain_text).sample, with_lora)
    SWITCHES[switch](unet)
    expected = run(copy.deepcopy(unet))
    assert (expected - with_lora).abs().max() > 1e-3 or switch == "fused and unfused"
    for given in ((row, projected), (plain_row, plain_text)):
        assert_rounding(runner(sample, *given).sample, expected, factor=256)
    one = runner(sample[3:], row, halves[1]).sample
    assert_rounding(one, expected[3:], factor=256)


def test_a_fused_lora_on_the_added_attention_has_its_own_norm():
    """A merge writes past autograd's version of the weight."""
    peft = pytest.importorskip("peft")
    unet, _ = inflated()
    run(unet)
    config = peft.LoraConfig(r=4, target_modules=["attn_temp.to_v"], init_lora_weights=False)
    unet.add_adapter(config)
    with_lora = run(unet)
    unet.fuse_lora()
    fused, (other, _) = run(unet), inflated()
    state = {n.replace(".base_layer", ""): x for n, x in unet.state_dict().items()}
    other.load_state_dict({n: x for n, x in state.items() if ".lora_" not in n})
    assert_rounding(fused, run(other))
    assert (fused - with_lora).abs().max() > 1e-4  # the norm is of the sum


@pytest.mark.parametrize("how", ["called", "runner"])
def test_the_scale_of_a_call_is_diffusers_own(how):
    state, sample = lora(*EVERYTHING), clip_inputs()
    plain = small_unet()
    load(plain, state)
    unet, _ = inflated(FRAME_BY_FRAME)
    load(unet, state)
    found = []
    for scale in (0.25, 0.0, 1.0):
        with torch.no_grad():
            expected = plain(
                *sample[:2], sample[2].repeat_interleave(3, 0),
                cross_attention_kwargs={"scale": scale},
            ).sample  # fmt: skip
        found.append(run(unet, how, scale))
        assert_rounding(found[-1], expected, factor=256)
    assert (found[0] - found[1]).abs().max() > 1e-3 < (found[1] - found[2]).abs().max()


def test_a_scale_renews_what_was_worked_out_at_another():
    unet, _ = inflated()
    load(unet, lora("to_k", "to_v"))
    sample, t, text = clip_inputs()
    runner = accelerate(unet)
    row, projected = runner.times(t[None])[0], runner.text(text)
    for scale in (0.25, 1.0):
        found = runner(sample, row, projected, cross_attention_kwargs={"scale": scale}).sample
        assert_rounding(found, run(unet, scale=scale), factor=256)


def test_a_row_that_would_pass_by_an_adapter_is_refused():
    unet, handle = inflated()
    sample, t, text = clip_inputs()
    row = handle.project_time(t[None])
    load(unet, lora(*TIME[:1]))
    with pytest.raises(ValueError, match="LoRA.*call it with the timestep"):
        unet(sample, t, text, timestep_cond=row, cross_attention_kwargs={"num_frames": 3})
    with pytest.raises(ValueError, match="LoRA.*call it with the timestep"):
        handle.project_time(t[None])
    unet.unload_lora()
    assert handle.holds_time()
    look(unet, sample, t, text)


def test_removal_leaves_an_adapter_that_came_later():
    state, expected = lora(*EVERYTHING), small_unet()
    sample, t, text = clip_inputs()
    load(expected, state)
    unet, handle = inflated()
    load(unet, state)
    handle.remove()
    with torch.no_grad():
        found, wanted = (
            u(sample[:3], t, text[:1].repeat(3, 1, 1)).sample for u in (unet, expected)
        )
    assert torch.equal(found, wanted)


# Weights that come and go with the call of a layer.


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
@every_recipe
def test_group_offloading_gives_the_same(recipe, kind, tmp_path):
    expected = run(inflated(recipe)[0])
    unet, _ = inflated(recipe)
    offload(unet, kind, tmp_path)
    for how in ("called", "runner"):
        assert_rounding(run(unet, how), expected)
    with pytest.raises(ValueError, match="compile takes all weights at once"):
        sample, t, text = clip_inputs()
        accelerate(unet, "compile")(sample, t, text)


def offload(unet, kind, folder):
    """To disk, which is what there is besides the CPU."""
    if not torch.accelerator.is_available() and diffusers.__version__ < "0.36":
        pytest.skip(f"diffusers {diffusers.__version__} offloads only with an accelerator")
    cpu = torch.device("cpu")
    more = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    unet.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type=kind,
        offload_to_disk_path=str(folder), **more,
    )  # fmt: skip


def test_text_that_was_projected_before_offloading(tmp_path):
    unet, _ = inflated()
    sample, t, text = clip_inputs()
    runner = accelerate(unet)
    row, projected = runner.times(t[None])[0], runner.text(text)
    expected = runner(sample, row, projected).sample
    load(unet, lora("to_k", "to_v"))
    unet.disable_lora()
    offload(unet, "leaf_level", tmp_path)
    with pytest.raises(ValueError, match="text was projected before the UNet changed"):
        runner(sample, row, projected)
    assert_rounding(runner(sample, row, text).sample, expected)


def test_layers_that_offloading_does_not_reach_are_not_added(tmp_path):
    unet = small_unet()
    offload(unet, "leaf_level", tmp_path)
    for recipe in (EI2, replace(FRAME_BY_FRAME, name="ei2", clip_group_norm=True)):
        with pytest.raises(TypeError, match="recipe ei2 adds layers.*switch it on after inflatio"):
            inflate(unet, recipe)
    expected = run(inflated(FRAME_BY_FRAME)[0])
    inflate(unet, FRAME_BY_FRAME)
    assert_rounding(run(unet, "runner"), expected)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("recipe", [EI2, TCVE], ids=lambda recipe: recipe.name)
def test_accelerates_offloading_gives_the_same(recipe, sequential):
    library = pytest.importorskip("accelerate")
    expected = run(inflated(recipe)[0])
    unet, _ = inflated(recipe)
    if sequential:
        library.cpu_offload(unet, torch.device("cpu"), offload_buffers=True)
    else:
        library.cpu_offload_with_hook(unet, torch.device("cpu"))
    for how in ("called", "runner"):
        assert_rounding(run(unet, how), expected)


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
@pytest.mark.parametrize("recipe", [EI2], ids=lambda recipe: recipe.name)
def test_layerwise_casting_is_told_before_and_after(recipe, storage):
    unet = small_unet()
    unet.enable_layerwise_casting(storage, torch.float32)
    with pytest.raises(TypeError, match="without enable_layerwise_casting"):
        inflate(unet, recipe)
    unet, _ = inflated(recipe)
    runner = accelerate(unet)
    unet.enable_layerwise_casting(storage, torch.float32)
    with pytest.raises(TypeError, match="without enable_layerwise_casting"):
        run(unet)
    with pytest.raises(TypeError, match="without enable_layerwise_casting"):
        runner(*clip_inputs())


# Hooks and classes.


def doubled(module, args, out):
    return out * 2


HOOKED = (
    "time_embedding", "time_embedding.linear_1", "down_blocks.0.resnets.0.time_emb_proj",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2", "mid_block.resnets.0", "conv_in",
)  # fmt: skip


@pytest.mark.parametrize("name", HOOKED)
def test_a_hook_counts_as_on_the_plain_unet(name):
    sample, t, text = clip_inputs()
    plain, (unet, _) = small_unet(), inflated(FRAME_BY_FRAME)
    for model in (plain, unet):
        model.get_submodule(name).register_forward_hook(doubled)
    with torch.no_grad():
        expected = plain(sample, t, text.repeat_interleave(3, 0)).sample
    for how in ("called", "runner"):
        assert_rounding(run(unet, how), expected)


def test_hooks_in_a_feed_forward_see_the_whole_batch(monkeypatch):
    from tvkernels import _inflate

    monkeypatch.setitem(_inflate.ROWS, "cpu", 64)
    unet, _ = inflated(FRAME_BY_FRAME)
    ff = unet.down_blocks[0].attentions[0].transformer_blocks[0].ff
    seen = []
    hook = ff.net[0].register_forward_hook(lambda m, args, out: seen.append(len(out)))
    run(unet)
    hook.remove()
    assert seen == [6]


def test_hooks_see_the_timestep():
    unet, _ = inflated()
    sample, _, text = clip_inputs()
    seen = []
    unet.register_forward_pre_hook(lambda m, args: seen.append(args[1].item()))
    runner = accelerate(unet)
    for time in runner.times(torch.tensor([901, 3])):
        runner(sample, time, text)
    runner(sample, 7, text)
    assert seen == [901, 3, 7]


def replace_class(unet, name):
    """As token merging and its kin do it, on every module of a class."""
    for module in unet.modules():
        kind = type(module)
        if kind.__name__ == name:
            module.__class__ = type(f"Other{name}", (kind,), {})


@pytest.mark.parametrize("name", ["BasicTransformerBlock", "ResnetBlock2D", "Transformer2DModel"])
@pytest.mark.parametrize("recipe", [FRAME_BY_FRAME, EI2], ids=lambda recipe: recipe.name)
def test_other_classes_before_and_after_inflation(recipe, name):
    expected = run(inflated(recipe)[0])
    before = small_unet()
    replace_class(before, name)
    before, _ = inflated(recipe, before)
    after, _ = inflated(recipe)
    replace_class(after, name)
    for unet in (before, after):
        assert torch.equal(run(unet), expected)
        assert_rounding(run(unet, "runner"), expected)


def test_frames_cut_into_windows_are_refused():
    """A window would be taken for a frame."""

    class Windows(nn.Module):
        def forward(self, x, **kwargs):
            return self.attn(x.unflatten(1, (4, -1)).flatten(0, 1), **kwargs).reshape(x.shape)

    for recipe in (FRAME_BY_FRAME, EI2):
        unet, _ = inflated(recipe)
        block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
        windows = Windows()
        windows.attn, block.attn1 = block.attn1, windows
        if recipe is EI2:
            with pytest.raises(ValueError, match="24 sequences of tokens for 6 frames"):
                run(unet)
        else:
            assert run(unet).isfinite().all()


def taken(unet):
    resnet = unet.down_blocks[0].resnets[0]
    resnet.norm1 = nn.GroupNorm(resnet.norm1.num_groups, resnet.norm1.num_channels)


LOST = {
    "norm1": taken,
    "hook": lambda unet: unet.mid_block.attentions[0].transformer_blocks[0]._forward_hooks.clear(),
    "attn_temp": lambda unet: setattr(
        unet.mid_block.attentions[0].transformer_blocks[0], "attn_temp", nn.Identity()
    ),
}


@pytest.mark.parametrize("what", LOST)
def test_what_we_placed_is_missed(what):
    unet, _ = inflated()
    LOST[what](unet)
    with pytest.raises(
        RuntimeError, match=f"replaced or removed the {what} that tvkernels placed"
    ):
        run(unet)


def test_a_free_unet_stays_free():
    sample, t, text = clip_inputs()
    plain, (unet, _) = small_unet(), inflated(FRAME_BY_FRAME)
    for model in (plain, unet):
        model.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    with torch.no_grad():
        expected = plain(sample, t, text.repeat_interleave(3, 0)).sample
    assert_rounding(run(unet, "runner"), expected)


# Copies.


@pytest.mark.parametrize("how", ["pickled", "copied"])
@pytest.mark.parametrize("recipe", [EI2, TCVE], ids=lambda recipe: recipe.name)
def test_copies_work_and_are_independent(recipe, how):
    unet, handle = inflated(recipe)
    expected = run(unet)
    twin = pickle.loads(pickle.dumps(unet)) if how == "pickled" else copy.deepcopy(unet)
    names = list(small_unet().state_dict())
    handle.remove()
    assert not any("forward" in vars(module) for module in unet.modules())
    assert "forward" in vars(twin.time_embedding)
    for way in ("called", "runner"):
        assert_rounding(run(twin, way), expected)
    twin._tvkernels_handle.remove()
    assert list(twin.state_dict()) == names
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())
    assert not any("forward" in vars(module) for module in twin.modules())
    assert not any(isinstance(module, ClipGroupNorm) for module in twin.modules())


def test_a_runner_is_copied_without_what_it_prepared():
    unet, _ = inflated()
    runner = accelerate(unet)
    expected = runner(*clip_inputs()).sample
    for twin in (pickle.loads(pickle.dumps(runner)), copy.deepcopy(runner)):
        assert twin.handle.model is not unet
        assert torch.equal(twin(*clip_inputs()).sample, expected)
