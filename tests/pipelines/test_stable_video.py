"""StableVideo: key frames, propagation, aggregation, and the pipeline on the demo's model."""

import dataclasses
import json

import pytest
import torch
import transformers
from demo_clips import write_with_mask
from diffusers import ControlNetModel

from tvkernels import atlas_sample
from tvkernels.atlas import AtlasSettings, save_atlas, train_atlas
from tvkernels.atlas.keys import aggregate, key_frames, median, texels_seen
from tvkernels.atlas.train import filled
from tvkernels.cli import main
from tvkernels.demo import MODEL_DIR
from tvkernels.demo.world import heldout_scene
from tvkernels.pipelines.cache import Cache
from tvkernels.pipelines.checks import ModelError
from tvkernels.pipelines.guides import hint_made, load_guides, prepared
from tvkernels.pipelines.stable_video import PROPAGATION, StableVideoPipeline, _Job
from tvkernels.video import VideoError, read_video

QUICK = AtlasSettings(steps=5, points=2048)
PROMPT = "a purple star on a gray checkered background"


@pytest.fixture(scope="module")
def clip():
    return heldout_scene(3, num_frames=4).render(64, 64)


@pytest.fixture(scope="module")
def atlas(clip):
    return train_atlas(clip.frames, [clip.masks > 0.5], QUICK, generator=seeded())


@pytest.fixture(scope="module")
def loaded():
    pipe = StableVideoPipeline.from_pretrained(MODEL_DIR)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(loaded, clip, atlas):
    """Three steps, median, on the clip's atlas."""
    own = StableVideoPipeline.settings
    loaded.settings = dataclasses.replace(own, steps=3, aggregation="median", atlas=QUICK)
    loaded.controlnets, loaded._interrupt = {"canny": None, "depth": None}, False
    return loaded.fit(clip.frames, atlas=atlas)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def edited(pipe, prompt=PROMPT, **options):
    return pipe(prompt, output_type="pt", **options).frames[0]


def plane(frames, shifts, size=16):
    """UV of frames [F, size^2, 2] that slide over an atlas, by texels."""
    axis = (2 * torch.arange(size) + 1) / size - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(1, -1, 2)
    return grid + 2 / size * torch.tensor([[[s, 0.0]] for s in shifts[:frames]])


class TestKeyFrames:
    def test_every_twentieth_and_three_at_least(self):
        alpha = torch.ones(41, 256)
        still = plane(1, [0]).expand(41, -1, -1)
        assert key_frames(still, alpha, (16, 16), 20, 0.5) == [0, 20, 40]
        assert key_frames(still[:7], alpha[:7], (16, 16), 20, 0.5) == [0, 3, 6]
        assert key_frames(still[:2], alpha[:2], (16, 16), 20, 0.5) == [0, 1]
        assert key_frames(still[:1], alpha[:1], (16, 16), 20, 0.5) == [0]

    def test_more_where_neighbours_show_too_little_of_each_other(self):
        uv = plane(9, [2 * f for f in range(9)])
        uv = (uv + 1) * 16 / 32 - 1  # the atlas is twice as wide as a frame
        alpha = torch.ones(9, 256)
        assert key_frames(uv, alpha, (16, 32), 20, 0.4) == [0, 4, 8]
        assert key_frames(uv, alpha, (16, 32), 20, 0.7) == [0, 2, 4, 6, 8]


class TestAggregation:
    def test_median_counts_what_is_seen(self):
        partial = [torch.full((1, 3, 3), v) for v in (0.1, 0.5, 0.9)]
        covers = [
            torch.tensor([[1.0, 1, 0]]),
            torch.tensor([[1.0, 0, 0]]),
            torch.tensor([[1.0, 1, 0]]),
        ]
        assert median(partial, covers)[0, :, 0].tolist() == pytest.approx([0.5, 0.1, 0])

    def test_network_comes_nearer_to_the_key_frames_than_its_start(self):
        uv = plane(2, [0, 0])
        targets = torch.rand(2, 256, 3, generator=seeded())
        alpha = (torch.arange(256) % 16 < 12).float().expand(2, -1)
        partial = list(targets.view(2, 16, 16, 3))
        start = torch.full((16, 16, 3), 0.2)
        found = aggregate(start, partial, targets, uv, alpha, steps=200, rate=0.1)

        def loss(atlas):  # eq. 7
            shown = atlas_sample(atlas[None].expand(2, -1, -1, -1), uv)
            return (alpha[..., None] * (shown - targets).abs()).sum()

        assert loss(found) < 0.8 * loss(start)
        again = aggregate(start, partial, targets, uv, alpha, steps=200, rate=0.1)
        assert torch.equal(found, again)

    def test_network_starts_at_its_skip(self):
        uv, start = plane(1, [0]), torch.rand(16, 16, 3, generator=seeded())
        targets = start.reshape(1, 256, 3)
        found = aggregate(start, [start], targets, uv, torch.ones(1, 256), steps=0)
        assert torch.equal(found, start)


class TestPipeline:
    def test_output_types_and_sizes(self, pipe, clip):
        frames = pipe(PROMPT, num_inference_steps=1, output_type="pil").frames
        assert len(frames) == 1 and len(frames[0]) == 4 and frames[0][0].size == (64, 64)
        shapes = {
            kind: pipe("", output_type=kind, return_dict=False)[0].shape
            for kind in ("np", "pt", "latent")
        }
        assert shapes == {"np": (1, 4, 64, 64, 3), "pt": (1, 4, 3, 64, 64), "latent": (4, 4, 8, 8)}

    def test_no_prompt_shows_the_atlas_itself(self, pipe, atlas):
        assert torch.equal(edited(pipe, ""), atlas.render())

    def test_prompts_reach_their_own_layer(self, pipe, atlas, clip):
        own, masks = atlas.render(), torch.from_numpy(clip.masks)
        inside, outside = masks > 0.98, masks < 0.01
        for options, kept, changed in (
            ({"prompt": PROMPT}, outside, inside),
            (
                {"foreground_prompt": "", "background_prompt": "a brown dotted background"},
                inside,
                outside,
            ),
        ):
            difference = (edited(pipe, **({"prompt": ""} | options)) - own).abs().mean(1)
            assert difference[kept].mean() < 0.01
            assert difference[changed].mean() > 0.02

    def test_same_seed_same_bytes(self, pipe, clip, atlas):
        pipe.settings = dataclasses.replace(pipe.settings, propagation="random", steps=1)
        one, two = edited(pipe), edited(pipe)
        assert torch.equal(one, two)
        assert torch.equal(edited(pipe, generator=seeded(0)), one)
        assert not torch.equal(edited(pipe, generator=seeded(7)), one)

    @pytest.mark.slow
    @pytest.mark.parametrize("way", PROPAGATION)
    def test_every_way_of_editing_key_frames(self, pipe, way):
        pipe.settings = dataclasses.replace(pipe.settings, propagation=way)
        assert torch.isfinite(edited(pipe)).all()

    def test_callback_counts_over_all_images_and_can_stop(self, pipe):
        seen = []

        def note(pipe, step, timestep, tensors):
            seen.append((step, tensors["latents"].shape))
            pipe._interrupt = step == 4
            return tensors

        edited(pipe, callback_on_step_end=note)
        assert [step for step, _ in seen] == list(range(5))
        assert {shape for _, shape in seen} == {(1, 4, 8, 8)}

    def test_bad_input(self, pipe, clip, atlas):
        with pytest.raises(ValueError, match="unknown output_type 'jpg'"):
            pipe(PROMPT, output_type="jpg")
        with pytest.raises(ValueError, match="callback inputs"):
            pipe(PROMPT, callback_on_step_end_tensor_inputs=["noise"])
        with pytest.raises(ValueError, match="2 foreground prompts for 1 foreground layers"):
            pipe(foreground_prompt=["a", "b"])
        with pytest.raises(ValueError, match="tunes nothing"):
            pipe.fit(clip.frames, num_steps=3)
        with pytest.raises(ValueError, match="the atlas is of"):
            pipe.fit(clip.frames[:2], atlas=atlas)
        wrong = dataclasses.replace(pipe.settings, aggregation="mean")
        with pytest.raises(ValueError, match="unknown aggregation 'mean'"):
            StableVideoPipeline.from_pretrained(MODEL_DIR, settings=wrong)

    def test_the_cache_keeps_an_atlas(self, pipe, clip, tmp_path):
        cache, masks = Cache(tmp_path), [clip.masks > 0.5]
        made = pipe.fit(clip.frames, masks=masks, generator=seeded(), cache=cache).atlas
        assert cache.hits == 0
        taken = pipe.fit(clip.frames, masks=masks, generator=seeded(), cache=cache).atlas
        assert cache.hits == 1 and torch.equal(taken.render(), made.render())
        pipe.fit(clip.frames, masks=[clip.masks > 0.9], generator=seeded(), cache=cache)
        assert cache.hits == 1


class TestPropagation:
    def test_a_frame_carried_to_itself_is_itself(self, pipe, atlas, clip):
        """Eq. 5 from a frame into the same one: what the atlas can hold of it comes back."""
        from tvkernels import atlas_splat

        uv, alpha = atlas.uv_maps(0)[1], atlas.alphas()[0, 1].flatten()
        edit = torch.rand(3, 64, 64, generator=seeded()) * 0.1 + 0.45
        points = edit.flatten(1).T[None]
        picture, cover = atlas_splat(points, uv[None], atlas.layers[0].size, weight=alpha[None])
        carried = pipe._carried(pipe._pixels[1], uv, alpha, picture[0], cover[0] > 0)
        solid = torch.from_numpy(clip.masks[1] > 0.99)
        assert (carried - edit).abs()[:, solid].mean() < 0.03
        outside = torch.from_numpy(clip.masks[1] < 0.01)
        assert (carried - pipe._pixels[1]).abs()[:, outside].mean() < 0.01

    def test_an_object_that_grows_is_carried_whole(self, pipe):
        """Its pixels in the frame before lie three texels apart in the atlas."""
        from tvkernels import atlas_splat

        axis = (torch.arange(32) + 0.5) / 16 - 1
        near = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)
        far = near * 3  # so that a third of a side is the whole object
        inside = (far.abs() < 1).all(1).float()
        edit = torch.tensor([0.9, 0.1, 0.1]).expand(1, 1024, 3)
        picture, cover = atlas_splat(edit, far[None], (32, 32), weight=inside[None])
        assert (cover == 0).any()
        seen = texels_seen(cover[0], far, inside, (32, 32))
        own = torch.zeros(3, 32, 32)
        carried = pipe._carried(own, near, torch.ones(1024), filled(picture[0], cover[0]), seen)
        middle = carried[:, 4:-4, 4:-4]
        torch.testing.assert_close(middle, edit[0, 0].view(3, 1, 1).expand_as(middle))
        moved = torch.zeros(32, 32)
        moved[4:8, 4:8] = 1  # a small piece: what is around it stays unseen
        assert not texels_seen(moved, near, moved.flatten(), (32, 32))[:, 12:].any()

    @pytest.mark.parametrize("way", PROPAGATION)
    def test_where_each_key_frame_starts(self, pipe, clip, way, monkeypatch):
        """Under the method's own way the object is already what the frame before was made."""
        pipe.settings = dataclasses.replace(pipe.settings, propagation=way)
        red, starts, noises = torch.tensor([0.9, 0.1, 0.1]).view(3, 1, 1).expand(3, 64, 64), [], []

        def edit(job, picture, noise, *others):
            starts.append(picture)
            noises.append(noise)
            return red

        monkeypatch.setattr(_Job, "edit", edit)
        edited(pipe)
        assert len(starts) == 3 and torch.equal(starts[0], pipe._pixels[0])
        for start, f in ((starts[1], 2), (starts[2], 3)):
            solid = torch.from_numpy(clip.masks[f] > 0.99)
            if way == "atlas":
                assert (start - red).abs()[:, solid].mean() < 0.1
                outside = torch.from_numpy(clip.masks[f] < 0.01)
                assert (start - pipe._pixels[f]).abs()[:, outside].mean() < 0.01
            else:
                assert torch.equal(start, red if way == "sequential" else pipe._pixels[f])
        if way in ("atlas", "sequential"):
            assert noises == [None] * 3
        else:
            assert torch.equal(noises[0], noises[1]) == (way == "fixed")

    def test_noise_to_t0_is_equation_6(self):
        clean, noise = torch.randn(2, 1, 4, 8, 8, generator=seeded()).unbind()
        level = _Job._at(clean, noise, torch.tensor(0.36))
        torch.testing.assert_close(level, 0.6 * clean + 0.8 * noise)

    def test_inversion_comes_back(self, pipe):
        """Without a change of prompt or guidance an edit is the picture, as the VAE has it."""
        pipe.settings = dataclasses.replace(pipe.settings, steps=20)
        job = _Job(pipe, 20, 1.0, "", None, None, (), False)
        with torch.no_grad():
            found = job.edit(pipe._pixels[0], None, job.texts(""), 0.5, "canny", None)
            latents = pipe._encode_video(pipe._pixels[:1], 1)
            plain = pipe._decode(latents, "pt", 1)[0, 0]
        assert (found - plain).abs().mean() < 0.02

    def test_a_fresh_controlnet_changes_nothing(self, pipe):
        """Its last layers start at zero, so that the noise is the plain UNet's."""
        net = ControlNetModel.from_unet(pipe.unet, load_weights_from_unet=False).eval()
        job = _Job(pipe, 3, 1.0, "", None, None, (), False)
        latents, t = torch.randn(1, 4, 8, 8, generator=seeded()), torch.tensor(500)
        with torch.no_grad():
            text = pipe._encode_prompts(["", PROMPT])
            hint = net.controlnet_cond_embedding(torch.rand(1, 3, 64, 64))
            found = job._under(net, latents, t, text, hint)
            times = pipe.runner.times(t[None])
            plain = pipe._predict(latents, times[0], pipe.runner.text(text))[0]
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)

    def test_a_hints_features_stand_for_it(self, pipe):
        net = ControlNetModel.from_unet(pipe.unet, load_weights_from_unet=False).eval()
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=seeded())
        net = net.double()  # a picture alone may round otherwise than two
        latents, t = torch.randn(2, 4, 8, 8, generator=seeded()).double(), torch.tensor(500)
        picture = torch.rand(1, 3, 64, 64, generator=seeded()).double()
        with torch.no_grad():
            text = pipe._encode_prompts(["", PROMPT]).double()
            _, expected = net(latents, t, text, picture.repeat(2, 1, 1, 1), return_dict=False)
            features = net.controlnet_cond_embedding(picture)
            with hint_made(net):
                _, found = net(latents, t, text, features, return_dict=False)
            _, after = net(latents, t, text, picture.repeat(2, 1, 1, 1), return_dict=False)
        torch.testing.assert_close(found, expected)
        assert torch.equal(after, expected) and expected.abs().max() > 0

    def test_controlnets_take_part_and_say_so(self, pipe, clip):
        assert pipe.what_guides().count("no ControlNet is given") == 2
        before = edited(pipe, background_prompt="a brown background")
        net = ControlNetModel.from_unet(pipe.unet, load_weights_from_unet=False).eval()
        given, calls = [], []
        net.controlnet_cond_embedding.register_forward_pre_hook(
            lambda module, args: given.append(args[0])
        )
        net.register_forward_hook(lambda *args: calls.append(None))
        pipe.controlnets = {"canny": net, "depth": net}
        pipe.depth_estimator = Depth()
        assert "edges" in pipe.what_guides() and "no ControlNet" not in pipe.what_guides()
        after = edited(pipe, background_prompt="a brown background")
        assert not torch.equal(before, after)
        # The first key frame and the background from noise alone, two more from t0 = 0.8.
        assert len(calls) == 3 + 2 + 2 + 3
        assert len(given) == 4, "a condition's features are made once"
        edges = given[0][0]
        assert set(edges.unique().tolist()) == {0.0, 1.0}
        # The object alone: no edge of the checkers far from it.
        assert not edges[0][torch.from_numpy(clip.masks[0] < 0.01) & far(clip.masks[0])].any()


class Depth(torch.nn.Module):
    def forward(self, pixels):
        depth = torch.linspace(0, 1, 32).view(1, 32, 1).expand(1, 32, 32)
        return type("Depth", (), {"predicted_depth": depth})


def far(mask):
    near = torch.nn.functional.max_pool2d(torch.from_numpy(mask)[None, None], 9, 1, 4)[0, 0]
    return near < 0.01


class TestGuides:
    def test_files_that_are_missing_or_do_not_fit(self, tmp_path, clip, atlas):
        with pytest.raises(ModelError, match="go together"):
            load_guides(depth="somewhere")
        with pytest.raises(ModelError, match="cannot load ControlNetModel from"):
            load_guides(canny=str(tmp_path))
        assert load_guides() == {}
        with pytest.raises(VideoError, match="no atlas in"):
            prepared(clip.frames, None, tmp_path)
        save_atlas(atlas, tmp_path, {"frames": "of others"})
        with pytest.raises(VideoError, match="is of other frames"):
            prepared(clip.frames, None, tmp_path)

    def test_a_controlnet_is_loaded_from_its_folder(self, pipe, tmp_path):
        ControlNetModel.from_unet(pipe.unet, load_weights_from_unet=False).save_pretrained(
            tmp_path
        )
        assert isinstance(load_guides(canny=str(tmp_path))["controlnet_canny"], ControlNetModel)

    def test_a_depth_model_sees_pictures_through_its_own_processor(self, pipe, tmp_path):
        """Of its own size, and normalised as it was trained; one that gives meters is refused."""
        config = transformers.DPTConfig(
            hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16,
            image_size=32, patch_size=8, backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
        )  # fmt: skip
        net = ControlNetModel.from_unet(pipe.unet, load_weights_from_unet=False)
        transformers.DPTForDepthEstimation(config).save_pretrained(tmp_path / "depth")
        options = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3}
        processor = transformers.DPTImageProcessor(image_std=[0.25] * 3, **options)
        processor.save_pretrained(tmp_path / "depth")
        net.save_pretrained(tmp_path / "net")
        guides = load_guides(depth=str(tmp_path / "net"), estimator=str(tmp_path / "depth"))
        own = StableVideoPipeline.from_pretrained(MODEL_DIR, **guides)
        seen = []
        own.depth_estimator.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        depth = own._depth(torch.ones(3, 40, 56))
        assert depth.shape == (1, 3, 40, 56) and seen[0].shape == (1, 3, 32, 32)
        torch.testing.assert_close(seen[0], torch.full_like(seen[0], 2.0))
        config.depth_estimation_type = "metric"
        config.save_pretrained(tmp_path / "depth")
        with pytest.raises(ModelError, match="gives distances"):
            load_guides(depth=str(tmp_path / "net"), estimator=str(tmp_path / "depth"))


@pytest.fixture(scope="module")
def folder(clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("edit")
    write_with_mask(clip, folder)
    return folder


class TestCommand:
    @pytest.fixture
    def command(self, folder):
        return [
            "edit", str(folder / "clip"), "--method", "stable-video", "--source-prompt",
            "a cyan star", "--prompt", PROMPT, "--size", "64", "--steps", "2",
        ]  # fmt: skip

    def test_edits_from_an_atlas_that_is_there(self, folder, command, capsys):
        where = ["--mask", str(folder / "mask"), "--steps", "5", "--points", "2048"]
        assert main(["atlas", str(folder / "clip"), "-o", str(folder / "atlas"), *where]) == 0
        output = folder / "out.mp4"
        options = ["--atlas-dir", str(folder / "atlas"), "--no-cache", "-o", str(output)]
        assert main([*command, *options]) == 0
        assert len(read_video(output)) == 4
        text = " ".join(capsys.readouterr().out.split())
        assert "no ControlNet is given" in text
        record = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
        assert record["settings"]["method"] == "stable-video"

    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            (["--max-memory", "8GB"], "--max-memory does not account for"),
            (["--controlnet-depth", "x"], "--controlnet-depth and --depth-model go together"),
            (["--atlas-dir", "nowhere"], "no atlas in nowhere"),
            (["--atlas-dir", "x", "--mask", "y"], "give either --atlas-dir or --mask"),
            (["--words", "a=b"], "stable-video takes no --words"),
            (["--tune-steps", "3"], "stable-video tunes nothing"),
        ],
    )
    def test_bad_input_is_one_line(self, folder, command, capsys, options, complaint):
        assert main([*command, *options, "-o", str(folder / "not.mp4")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert complaint in line

    def test_other_methods_refuse_its_options(self, folder, command, capsys):
        command[3] = "ei2"
        options = ["--background-prompt", "snow", "-o", str(folder / "not.mp4")]
        assert main([*command, *options]) == 2
        assert "ei2 takes no --background-prompt" in capsys.readouterr().err
