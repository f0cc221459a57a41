"""Every method on a device that is not the CPU: everything is brought along, nothing else told."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from elsewhere import Elsewhere, elsewhere
from tiny_pipelines import save_model
from tiny_unets import clip_inputs, seeded, tiny_unet

import tvkernels
from tvkernels import FramePattern
from tvkernels.atlas.keys import aggregate
from tvkernels.pipelines import METHODS, pipeline_class
from tvkernels.pipelines.cache import Cache

SOURCE, TARGET = "a red circle on a gray background", "a blue star on a gray background"
FRAMES, SIDE = 3, 32


@pytest.fixture
def clip():
    """A square that moves over a fixed picture, uint8 [F, H, W, 3], and where it is."""
    y, x = np.mgrid[:SIDE, :SIDE]
    frames = np.stack([np.stack([5 * x, 7 * y, 3 * x + 2 * y], 2).astype(np.uint8)] * FRAMES)
    mask = np.zeros((FRAMES, SIDE, SIDE), bool)
    for f in range(FRAMES):
        mask[f, 8 + f : 20 + f, 6 + 2 * f : 18 + 2 * f] = True
    frames[mask] = (250, 20, 20)
    return frames, mask


def edit(pipe, clip, device, cache=None):
    """All a method does: tuned, inverted, edited under guidance."""
    frames, mask = clip
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "generator": seeded(), "output_type": "pt"}
    name = pipe.settings.recipe.name
    tuned = bool(pipe.settings.recipe.tuned)
    if name == "stable-video":
        pipe.fit(frames, generator=seeded(), masks=mask[None], cache=cache)
        options["background_prompt"] = "a green striped background"
    else:
        pipe.fit(frames, SOURCE, num_steps=tuned, generator=seeded(), cache=cache)
        pipe.invert(frames, num_inference_steps=1, cache=cache)
    if name == "blended-diffusion":
        options["words"] = [("red circle", "blue star")]
    return pipe(TARGET, **options).frames


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def load(folder):
    return partial(loaded, folder)


def loaded(folder, method, dtype=torch.float32, **kwargs):
    """A model in miniature under a method."""
    cls = pipeline_class(method)
    if method == "stable-video":
        atlas = dataclasses.replace(cls.settings.atlas, steps=1)
        kwargs["settings"] = dataclasses.replace(cls.settings, atlas=atlas, aggregation="median")
    return cls.from_pretrained(folder, torch_dtype=dtype, **kwargs)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_gives_what_it_gives_on_a_cpu(method, clip, load):
    expected = edit(load(method), clip, "cpu")
    pipe = load(method)
    with elsewhere() as device:
        found = edit(pipe, clip, device)
    assert type(found) is Elsewhere
    torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-3)


def test_a_tuning_from_the_cache_in_bfloat16(clip, load, tmp_path):
    pipe = load("ei2", torch.bfloat16)
    with elsewhere() as device:
        found, again = (edit(pipe, clip, device, Cache(tmp_path)) for _ in range(2))
    assert torch.equal(found.values, again.values)


def test_partial_atlases_are_aggregated():
    drawn = torch.rand(2, 8, 8, 3), torch.rand(2, 9, 3), torch.rand(2, 9, 2), torch.ones(2, 9)
    with elsewhere() as device:
        partial, *rest = (x.to(device) for x in drawn)
        assert aggregate(partial[0], partial, *rest, steps=2).device == device


def test_guides_come_along(clip, load, folder):
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    nets = [ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8,) * 4)] * 2

    class Depth(torch.nn.Module):
        """[1, 3, H, W] -> predicted_depth [1, H, W], as depth models of transformers."""

        def __init__(self):
            super().__init__()
            self.near = torch.nn.Parameter(torch.rand(3))

        def forward(self, pixels):
            depth = torch.einsum("bchw,c->bhw", pixels, self.near)
            return type("Output", (), {"predicted_depth": depth})

    pipe = load("stable-video", controlnet_canny=nets[0], controlnet_depth=nets[1],
                depth_estimator=Depth())  # fmt: skip
    with elsewhere() as device:
        assert edit(pipe, clip, device).values.isfinite().all()


@pytest.mark.parametrize(
    "pattern", [FramePattern.own(), FramePattern.first_previous(), FramePattern.fine_coarse(2)]
)
def test_an_installed_pattern(pattern):
    sample, t, text = clip_inputs()
    text = text.repeat_interleave(3, 0)
    unet = tiny_unet()
    with tvkernels.install(unet, pattern, num_frames=3), torch.no_grad():
        expected = unet(sample, t, text).sample
    with elsewhere() as device, tvkernels.install(unet.to(device), pattern, num_frames=3):
        found = unet(sample.to(device), t, text.to(device)).sample
        found.sum().backward()
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-4)


def test_what_stays_behind_is_an_error():
    with elsewhere() as device:
        x = torch.ones(2, 2, device=device)
        assert (x + 1).sum().item() == 8 and x.cpu().device.type == "cpu"
        with pytest.raises(RuntimeError, match="aten::mm: .* is on the cpu"):
            x @ torch.ones(2, 2)
