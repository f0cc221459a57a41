"""Pipelines of UNets that something else touches: tuned, called, pickled."""

import pickle

import pytest
import torch
from tiny_pipelines import loader, noisy_clip, save_model
from tiny_unets import assert_rounding, seeded

CALL = {"num_inference_steps": 3, "output_type": "latent"}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    return loader(save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def latents():
    return torch.randn(3, 4, 4, 6, generator=seeded())


def offload(unet, folder):
    """To disk, which is what there is besides the CPU."""
    cpu = torch.device("cpu")
    unet.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type="leaf_level",
        offload_to_disk_path=str(folder),
    )  # fmt: skip


def test_an_edit_with_offloaded_layers_and_no_tuning(load, latents, tmp_path):
    expected = load()("a star", latents=latents, **CALL).frames
    pipe = load()
    offload(pipe.unet, tmp_path)
    handle = pipe.handle
    for name, given in {
        "fit": (noisy_clip(), "a clip"), "save_pretrained": (tmp_path / "saved",),
        "load_lora_weights": ({},), "unload_lora_weights": (), "fuse_lora": (),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"call {name}.. before enable_group_offload"):
            getattr(pipe, name)(*given)
    with pytest.raises(ValueError, match="call remove.. before enable_group_offload"):
        pipe.handle.remove()
    assert not (tmp_path / "saved").exists()
    assert pipe.handle is handle
    assert_rounding(pipe("a star", latents=latents, **CALL).frames, expected, factor=256)


def test_an_adapter_that_is_switched_between_steps_counts_from_there(load, latents):
    peft = pytest.importorskip("peft")
    pipe, seen = load(), []
    plain = pipe("a star", latents=latents, **CALL).frames
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    pipe.unet.add_adapter(config)
    always = pipe("a star", latents=latents, **CALL).frames

    def switch(pipe, step, t, given):
        seen.append(given["latents"])
        pipe.unet.disable_adapters()
        return {}

    found = pipe("a star", latents=latents, callback_on_step_end=switch, **CALL).frames
    assert (found - always).abs().max() > 1e-3 < (found - plain).abs().max()

    def replay(pipe, step, t, given):
        return {"latents": seen[0]} if step == 0 else {}

    expected = load()("a star", latents=latents, callback_on_step_end=replay, **CALL).frames
    assert_rounding(found, expected, factor=256)


def test_what_hangs_on_the_unet_sees_the_schedule(load, latents):
    pipe, seen = load(), []
    pipe.unet.register_forward_pre_hook(lambda m, args: seen.append(args[1].item()))
    pipe("a star", latents=latents, **CALL)
    assert seen == pipe.scheduler.timesteps.tolist()


def test_a_pickled_pipeline_edits_as_before(load, latents):
    pipe = load()
    twin = pickle.loads(pickle.dumps(pipe))
    assert twin.handle is twin.unet._tvkernels_handle is not pipe.handle
    found, expected = (p("a star", latents=latents, **CALL).frames for p in (twin, pipe))
    assert torch.equal(found, expected)
