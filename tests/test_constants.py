"""What is the same for every step and frame of an edit is worked out once: text and time."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("diffusers")

from tiny_unets import assert_rounding, clip_inputs, tiny_unet

from tvkernels import inflate
from tvkernels.benchmarks.edits.meter import Meter
from tvkernels.nn.temporal_unet import TemporalUNet
from tvkernels.recipes import EI2, FRAME_BY_FRAME, RECIPES, TUNE_A_VIDEO

every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def look(unet, sample, t, text, **more):
    frames = {"num_frames": sample.shape[0] // text.shape[0]}
    with torch.no_grad():
        return unet(sample, t, text, cross_attention_kwargs=frames, **more).sample


@every_recipe
def test_projected_text_is_the_text(recipe):
    unet = tiny_unet()
    sample, t, text = clip_inputs(2, 3, tokens=7)
    with inflate(unet, recipe) as handle:
        projected = handle.project_text(text)
        assert projected.shape == (2, 7, handle.text_width)
        calls = []
        for name, module in unet.named_modules():
            if name.endswith(("attn2.to_k", "attn2.to_v")):
                module.register_forward_hook(lambda m, args, out: calls.append(m))
        found = look(unet, sample, t, projected)
        assert not calls
        assert_rounding(found, look(unet, sample, t, text))


@every_recipe
def test_a_row_of_the_time_table_is_the_timestep(recipe, monkeypatch):
    unet = tiny_unet()
    sample, _, text = clip_inputs(2, 3)
    timesteps = torch.tensor([901, 501, 1])
    with inflate(unet, recipe) as handle:
        table = handle.project_time(timesteps)
        assert table.shape == (3, handle.time_width)
        embedding = {unet.time_embedding.linear_1, unet.time_embedding.linear_2}
        linear, rows = torch.nn.Linear.forward, []

        def counted(module, x):
            rows.extend([module] if module in embedding else [])
            return linear(module, x)

        monkeypatch.setattr(torch.nn.Linear, "forward", counted)
        for t, row in zip(timesteps, table.split(1), strict=True):
            # Whatever the timestep says, the row counts.
            found = look(unet, sample, torch.tensor(7), text, timestep_cond=row)
            assert not rows
            assert_rounding(found, look(unet, sample, t, text))
            assert len(rows) == 2
            rows.clear()
        assert not torch.equal(table[0], table[1])


def test_one_timestep_is_embedded_once_and_several_each():
    unet = tiny_unet()
    sample, _, text = clip_inputs(2, 3)
    rows = []
    unet.time_embedding.linear_1.register_forward_hook(
        lambda m, args, out: rows.append(out.shape[0])
    )
    each = torch.tensor([901, 901, 901, 5, 5, 5])
    with inflate(unet, EI2):
        look(unet, sample, 901, text)
        look(unet, sample, torch.tensor(901), text)
        look(unet, sample, torch.tensor([901]), text)
        mixed = look(unet, sample, each, text)
        first = look(unet, sample[:3], torch.tensor(901), text[:1])
    assert rows == [1, 1, 1, 6, 1]
    assert_rounding(mixed[:3], first)


def test_lora_and_trained_projections_count():
    """The projections are called as modules, so that whatever replaced them takes part."""
    unet = tiny_unet()
    sample, t, text = clip_inputs(2, 3)
    with inflate(unet, TUNE_A_VIDEO) as handle:
        before = handle.project_text(text)
        layer = next(m for n, m in unet.named_modules() if n.endswith("attn2"))
        plain, layer.to_k = layer.to_k, torch.nn.Sequential(layer.to_k, torch.nn.ReLU())
        after = handle.project_text(text)
        assert not torch.equal(before, after)
        assert_rounding(look(unet, sample, t, after), look(unet, sample, t, text))
        layer.to_k = plain


def test_what_has_no_table_says_so():
    sample, t, text = clip_inputs(2, 3)
    unet = tiny_unet(time_cond_proj_dim=8)
    with inflate(unet, FRAME_BY_FRAME) as handle:
        assert handle.time_width is None
        with pytest.raises(ValueError, match="no table"):
            handle.project_time(torch.tensor([1]))
        look(unet, sample, t, text, timestep_cond=torch.randn(6, 8))
    with inflate(tiny_unet(), EI2) as handle, pytest.raises(ValueError, match=r"\[B, L, 32\]"):
        handle.project_text(torch.randn(2, 7, 31))


def sd15():
    """Stable Diffusion 1.5's UNet, shapes alone."""
    import diffusers

    config = {
        "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8,
        "block_out_channels": (320, 640, 1280, 1280),
    }  # fmt: skip
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(**config).eval()


@pytest.fixture(scope="module")
def counted():
    """FLOPs on SD-1.5 for 24 frames: (what, with whom) -> of one step or one edit."""
    unet, frames = sd15(), 24
    states = torch.empty(1, 77, 768, device="meta")
    sinusoid = torch.empty(1, 320, device="meta")
    embedded = torch.empty(1, 1280, device="meta")
    layers = [m for n, m in unet.named_modules() if n.endswith("attn2")]
    resnets = [m for m in unet.modules() if type(m).__name__ == "ResnetBlock2D"]
    with torch.no_grad(), FlopCounterMode(display=False) as text:
        for layer in layers:
            layer.to_k(states), layer.to_v(states)
    with torch.no_grad(), FlopCounterMode(display=False) as time:
        unet.time_embedding(sinusoid)
        for resnet in resnets:
            resnet.time_emb_proj(embedded)
    with inflate(unet, FRAME_BY_FRAME) as handle:
        with FlopCounterMode(display=False) as text_ours:
            handle.project_text(states.expand(3, -1, -1))
        with FlopCounterMode(display=False) as time_ours:
            handle.project_time(torch.empty(100, device="meta"))
        # The step itself: neither text nor time is left in it.
        sample = torch.empty(2 * frames, 4, 64, 64, device="meta")
        known = torch.empty(2, 77, handle.text_width, device="meta")
        row = torch.empty(1, handle.time_width, device="meta")
        with FlopCounterMode(display=False) as lean:
            look(unet, sample, torch.tensor(1), known, timestep_cond=row)
        with FlopCounterMode(display=False) as shared:
            look(unet, sample, torch.tensor(1), states.expand(2, -1, -1))
    per_image = (text.get_total_flops(), time.get_total_flops())
    assert shared.get_total_flops() - lean.get_total_flops() == 2 * per_image[0] + per_image[1]
    images = 50 * frames * (1 + 2)  # 50 steps of inversion, 50 of sampling with guidance
    step = lean.get_total_flops() // (2 * frames)
    with FakeTensorMode(), torch.no_grad(), Meter() as branch:
        net = TemporalUNet(4, unet.config.block_out_channels, 2, 32, 8)
        net(torch.empty(1, frames, 4, 64, 64))
    return {
        "text": (per_image[0] * images, text_ours.get_total_flops()),
        "time": (per_image[1] * images, time_ours.get_total_flops()),
        "the inversion's guided half": (50 * frames * step, 0),
        "TCVE's branch": (50 * (1 + 2) * branch.flops, 50 * (1 + 1) * branch.flops),
    }


def test_the_docs_table_of_saved_work_is_what_is_counted(counted):
    lines = (
        (Path(__file__).parents[1] / "docs" / "constants.md")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "| " in line]
    table = {row[0]: tuple(row[1:3]) for row in rows[1:] if len(row) >= 3}
    told = {what: tuple(f"{n / 1e9:,.1f}" for n in pair) for what, pair in counted.items()}
    assert {what: table.get(what) for what in told} == told


def test_the_docs_count_a_controlnets_condition():
    from diffusers import ControlNetModel

    with torch.device("meta"):
        net, picture = ControlNetModel(), torch.empty(1, 3, 512, 512)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        net.controlnet_cond_embedding(picture)
    text = (Path(__file__).parents[1] / "docs" / "constants.md").read_text(encoding="utf-8")
    assert f"{counted.get_total_flops() / 1e9:.1f} GFLOP at 512 x 512" in text
