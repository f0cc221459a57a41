"""The layered atlas: masks, flow and motion it starts from, its training, files and commands."""

import dataclasses
import os
import time

import numpy as np
import PIL.Image
import pytest
import torch
from clip_files import encode
from demo_clips import write_with_mask

from tvkernels.atlas import (
    AtlasError,
    AtlasSettings,
    LayeredAtlas,
    load_atlas,
    save_atlas,
    train,
    train_atlas,
)
from tvkernels.atlas.files import MODEL, read_picture
from tvkernels.atlas.motion import affine_chain, subtract_background
from tvkernels.atlas.train import filled, psnr
from tvkernels.cli import main
from tvkernels.demo.world import heldout_scene
from tvkernels.video import VideoError, read_mask, read_video, write_video
from tvkernels.video import flow as flows

SMALL = AtlasSettings(steps=40, points=4096)


@pytest.fixture(scope="module")
def clip():
    """Scene 3 at 64 x 64: a star on a checkered, panning background."""
    return heldout_scene(3, num_frames=5).render(64, 64)


@pytest.fixture(scope="module")
def atlas(clip):
    generator = torch.Generator().manual_seed(0)
    return train_atlas(clip.frames, [clip.masks > 0.5], SMALL, generator=generator)


@pytest.fixture(scope="module")
def written(clip, tmp_path_factory):
    """A folder in which `tvk atlas` has worked, and its clip and mask."""
    folder = tmp_path_factory.mktemp("atlas")
    write_with_mask(clip, folder)
    arguments = ["--mask", str(folder / "mask"), "--steps", "10", "--points", "4096"]
    assert main(["atlas", str(folder / "clip"), "-o", str(folder / "out"), *arguments]) == 0
    return folder


def test_an_atlas_is_not_written_over(written, capsys):
    """Its pictures are there to be edited by hand."""
    before = (written / "out" / "background.png").read_bytes()
    assert main(["atlas", str(written / "clip"), "-o", str(written / "out"), "--steps", "1"]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert (written / "out" / "background.png").read_bytes() == before


def last_line(capsys):
    (line,) = capsys.readouterr().err.splitlines()
    return line


def save(path, picture):
    PIL.Image.fromarray(picture).save(path)
    return path


class TestMasks:
    def test_an_image_holds_for_every_frame(self, tmp_path):
        picture = np.zeros((6, 8), np.uint8)
        picture[2:4, 3:] = 255
        mask = read_mask(save(tmp_path / "m.png", picture), 3, (6, 8))
        assert mask.dtype == bool and mask.shape == (3, 6, 8)
        assert (mask == (picture > 0)).all()

    def test_a_folder_and_a_video_hold_one_for_each_frame(self, tmp_path):
        truth = np.zeros((12, 16, 16), bool)
        for f in range(12):
            truth[f, :, f : f + 4] = True
        pictures = np.repeat(truth[..., None] * np.uint8(255), 3, -1)
        (tmp_path / "folder").mkdir()
        for f, picture in enumerate(pictures):  # natural order: 10 comes after 9
            save(tmp_path / "folder" / f"{f}.png", picture)
        assert (read_mask(tmp_path / "folder", 12, (16, 16)) == truth).all()
        write_video(tmp_path / "mask.mp4", pictures, 8)
        assert (read_mask(tmp_path / "mask.mp4", 12, (16, 16)) == truth).mean() > 0.97

    def test_palettes_and_transparency(self, tmp_path):
        picture = PIL.Image.new("P", (4, 2))
        picture.putpalette([0, 0, 0, 128, 0, 0])  # the first object's colour of annotations
        picture.putpixel((1, 0), 1)
        picture.save(tmp_path / "p.png")
        assert read_mask(tmp_path / "p.png", 1, (2, 4)).sum() == 1
        clear = np.full((2, 4, 4), 255, np.uint8)
        clear[:, 1:, 3] = 0
        assert read_mask(save(tmp_path / "c.png", clear), 1, (2, 4)).sum() == 2

    def test_what_does_not_fit_is_said(self, tmp_path):
        path = save(tmp_path / "m.png", np.full((6, 8), 255, np.uint8))
        with pytest.raises(VideoError, match="8 x 6 pixels, the clip's frames are 6 x 6"):
            read_mask(path, 1, (6, 6))
        save(tmp_path / "black.png", np.zeros((6, 8), np.uint8))
        with pytest.raises(VideoError, match="marks nothing"):
            read_mask(tmp_path / "black.png", 1, (6, 8))
        (tmp_path / "two").mkdir()
        for name in ("0.png", "1.png"):
            save(tmp_path / "two" / name, np.full((6, 8), 255, np.uint8))
        with pytest.raises(VideoError, match="2 masks, 3 frames are taken"):
            read_mask(tmp_path / "two", 3, (6, 8))
        (tmp_path / "none").mkdir()
        with pytest.raises(VideoError, match="0 masks"):
            read_mask(tmp_path / "none", 3, (6, 8))
        with pytest.raises(VideoError, match="does not exist"):
            read_mask(tmp_path / "nowhere.png", 1, (6, 8))
        (tmp_path / "text.txt").write_text("white", encoding="utf-8")
        with pytest.raises(VideoError, match="is not a mask"):
            read_mask(tmp_path / "text.txt", 1, (6, 8))


class TestMotion:
    @pytest.mark.parametrize("method", flows.METHODS)
    def test_flow_of_a_known_motion(self, method):
        large = heldout_scene(3).render(128, 128).frames[0]
        frames = np.stack(
            [large[20 + 2 * f : 100 + 2 * f, 30 - 3 * f :][:, :80] for f in range(3)]
        )
        flow = flows.optical_flow(frames, method)
        assert flow.trusted.mean() > 0.8
        assert abs(np.median(flow.forward[flow.trusted], 0) - (3, -2)).max() < 0.25

    def test_a_cut_has_no_flow(self):
        frames = heldout_scene(3, num_frames=3).render(64, 64).frames
        with pytest.raises(VideoError, match="no optical flow from frame 2 to 3"):
            flows.optical_flow(np.concatenate([frames, 255 - frames]))
        noise = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
        with pytest.raises(VideoError, match="no optical flow"):
            flows.optical_flow(noise, "farneback")

    def test_bad_input(self):
        frames = np.zeros((2, 8, 64, 3), np.uint8)
        with pytest.raises(VideoError, match="too small"):
            flows.optical_flow(frames)
        with pytest.raises(VideoError, match="unknown optical flow 'raft'"):
            flows.optical_flow(frames, "raft")

    def test_absent_opencv_names_its_extra(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "cv2", None)
        with pytest.raises(ImportError, match=r"tvkernels\[atlas\]"):
            flows.optical_flow(np.zeros((2, 64, 64, 3), np.uint8))

    def test_the_background_chain_follows_the_known_panning(self, clip):
        flow = flows.optical_flow(clip.frames)
        chain = affine_chain(flow, clip.masks < 0.5)
        dx, dy = clip.scene.background_shift(0, 64, 64)
        for f, found in enumerate(chain):
            centre = found[:, :2] @ (32, 32) + found[:, 2]
            moved = np.array([32 + (2 - f) * dx, 32 + (2 - f) * dy])
            assert abs(centre - moved).max() < 0.5

    @pytest.mark.parametrize("scene", (0, 3))
    def test_what_moves_is_found(self, scene):
        drawn = heldout_scene(scene).render()
        flow = flows.optical_flow(drawn.frames)
        (found,) = subtract_background(drawn.frames, flow)
        truth = drawn.masks > 0.5
        assert (found & truth).sum() / (found | truth).sum() > 0.85

    @pytest.mark.slow
    def test_two_objects_are_told_apart(self):
        drawn = heldout_scene(3, objects=2).render()
        found = subtract_background(drawn.frames, flows.optical_flow(drawn.frames), 2)
        truth = drawn.object_masks > 0.5
        scores = [[(a & b).sum() / (a | b).sum() for b in truth] for a in found]
        assert min(max(row) for row in scores) > 0.8
        assert {int(np.argmax(row)) for row in scores} == {0, 1}

    def test_a_still_clip_has_no_object(self):
        frames = np.repeat(heldout_scene(3).render(64, 64).frames[:1], 3, 0)
        with pytest.raises(VideoError, match="give the object's mask with --mask"):
            subtract_background(frames, flows.optical_flow(frames))


class TestTraining:
    def test_reconstructs_a_short_clip(self, clip, atlas):
        # Without a step it is at 34 dB: the start alone must not pass.
        assert psnr(atlas, clip.frames) > 38
        assert atlas.names == ["foreground", "background"]

    def test_training_gains_on_its_start(self, clip, atlas):
        start = train_atlas(clip.frames, [clip.masks > 0.5], AtlasSettings(steps=0))
        assert psnr(atlas, clip.frames) > psnr(start, clip.frames) + 3

    def test_same_seed_same_bits(self, clip):
        mask, short = [clip.masks > 0.5], AtlasSettings(steps=3, points=2048)
        one, two, other = (
            train_atlas(clip.frames, mask, short, generator=torch.Generator().manual_seed(s))
            for s in (0, 0, 1)
        )
        state = two.state_dict()
        assert all(torch.equal(x, state[name]) for name, x in one.state_dict().items())
        assert not torch.equal(one.layers[0].colors, other.layers[0].colors)

    @pytest.mark.parametrize(
        "weight", ("rigidity", "flow_weight", "opacity_flow", "sparsity", "mask")
    )
    def test_every_term_takes_part(self, clip, weight):
        found = []
        for factor in (0, 100):
            short = AtlasSettings(steps=3, points=2048)
            short = dataclasses.replace(short, **{weight: factor * getattr(short, weight)})
            generator = torch.Generator().manual_seed(0)
            model = train_atlas(clip.frames, [clip.masks > 0.5], short, generator=generator)
            found.append(torch.cat([x.flatten() for x in model.state_dict().values()]))
        assert not torch.equal(*found)

    def test_rigidity_and_flow_are_their_formulas(self, clip):
        """|J^T J| + |(J^T J)^-1| of known maps, and the way between two frames in pixels."""
        frames = np.repeat(clip.frames[:1], 2, 0)
        flow = flows.optical_flow(frames)
        flow = dataclasses.replace(flow, forward=flow.forward * 0 + np.float32([3, 4]))
        settings = AtlasSettings(texels=1.0).of(2, 64, 64)
        eye = torch.eye(2, 3).expand(2, -1, -1)
        model = LayeredAtlas([eye, eye], [(64, 64)] * 2, [torch.full((2, 64, 64), 9.0)])
        pixels = torch.from_numpy(frames).flatten(1, 2).float() / 255
        trainer = train._Trainer(model, settings, pixels, torch.ones(1, 2, 4096), flow, None)
        assert trainer._rigidity(0).item() == pytest.approx(2 * 2**0.5, rel=1e-4)
        draw = torch.full((2, 1), 2080)  # the middle
        points = trainer.grid[draw]
        uv = [layer.uv(points) for layer in model.layers]
        alpha = [model.opacity(0, points)]
        trainer.trusted.fill_(1)
        away = trainer._flow(draw, points, uv, alpha).item()  # 5 pixels in front, none behind
        assert away == pytest.approx(5 * settings.flow_weight, rel=1e-3)
        with torch.no_grad():
            model.layers[0].affine[:, 0, 0] = 2
        expected = 17**0.5 + (1 / 16 + 1) ** 0.5
        assert trainer._rigidity(0).item() == pytest.approx(expected, rel=1e-3)

    def test_numbers_that_the_clips_size_decides(self):
        small, large = AtlasSettings().of(8, 128, 128), AtlasSettings().of(24, 256, 256)
        assert (small.steps, small.points) == (320, 16_384)
        assert (large.steps, large.points) == (1280, 49_152)
        assert AtlasSettings(steps=0, points=7).of(8, 128, 128).steps == 0

    def test_several_layers(self):
        drawn = heldout_scene(2, num_frames=4, objects=2).render(64, 64)
        masks = list(drawn.object_masks > 0.5)
        model = train_atlas(drawn.frames, masks, AtlasSettings(steps=10, points=4096))
        assert model.names == ["foreground-1", "foreground-2", "background"]
        assert psnr(model, drawn.frames) > 28
        other = 1 - model.layers[1].colors
        changed = (model.render({1: other}) - model.render()).abs().amax(1) > 0.2
        assert (changed.numpy() & masks[1]).sum() > 0.8 * masks[1].sum()
        assert (changed.numpy() & masks[0]).sum() < 0.1 * masks[0].sum()

    def test_one_frame_needs_no_flow(self, clip):
        model = train_atlas(clip.frames[:1], [clip.masks[:1] > 0.5], AtlasSettings(steps=2))
        assert model.render().shape == (1, 3, 64, 64)

    def test_holes_are_filled_from_around(self):
        picture, cover = torch.zeros(8, 8, 3), torch.zeros(8, 8)
        picture[:, :3], cover[:, :3] = 0.5, 1.0
        full = filled(picture, cover)
        torch.testing.assert_close(full, torch.full_like(full, 0.5))
        assert torch.equal(filled(picture, torch.ones(8, 8)), picture)

    def test_render_is_equation_3(self, clip, atlas):
        """Pixel by pixel, from the layers' own UV, in numpy."""
        shown, f = atlas.render(), 1
        alpha = atlas.alphas()[0, f].numpy()[..., None]
        colors = []
        for i, layer in enumerate(atlas.layers):
            height, width = layer.size
            uv = atlas.uv_maps(i)[f].numpy().reshape(64, 64, 2)
            x = np.clip(((uv[..., 0] + 1) * width - 1) / 2, 0, width - 1)
            y = np.clip(((uv[..., 1] + 1) * height - 1) / 2, 0, height - 1)
            x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
            x1, y1 = np.minimum(x0 + 1, width - 1), np.minimum(y0 + 1, height - 1)
            a, b = (x - x0)[..., None], (y - y0)[..., None]
            c = layer.colors.numpy()
            upper, lower = (1 - a) * c[y0, x0] + a * c[y0, x1], (1 - a) * c[y1, x0] + a * c[y1, x1]
            colors.append((1 - b) * upper + b * lower)
        expected = alpha * colors[0] + (1 - alpha) * colors[1]
        torch.testing.assert_close(
            shown[f].permute(1, 2, 0), torch.from_numpy(expected.clip(0, 1)).float(),
            rtol=1e-4, atol=1e-4,
        )  # fmt: skip

    @pytest.mark.slow
    def test_the_demo_clip_in_two_minutes(self):
        drawn, began = heldout_scene(0).render(), time.perf_counter()
        model = train_atlas(drawn.frames, [drawn.masks > 0.5])
        assert psnr(model, drawn.frames) >= 30
        assert time.perf_counter() - began < 120


class TestFiles:
    def test_what_is_saved_is_loaded(self, atlas, tmp_path):
        save_atlas(atlas, tmp_path, {"fps": "8"})
        loaded, info = load_atlas(tmp_path)
        assert info == {"fps": "8"}
        assert torch.equal(loaded.render(), atlas.render())
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            MODEL,
            "background.png",
            "foreground.png",
        ]

    def test_broken_files_are_told(self, atlas, tmp_path):
        with pytest.raises(AtlasError, match="no atlas in"):
            load_atlas(tmp_path)
        path = save_atlas(atlas, tmp_path, {})
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(AtlasError, match="fails its checksum"):
            load_atlas(tmp_path)
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(AtlasError, match="cannot be read"):
            load_atlas(tmp_path)
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(1)}, path)
        with pytest.raises(AtlasError, match="is no atlas"):
            load_atlas(tmp_path)

    def test_a_full_disk_leaves_nothing(self, atlas, tmp_path, monkeypatch):
        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(VideoError, match="No space left on device"):
            save_atlas(atlas, tmp_path, {})
        assert not list(tmp_path.iterdir())

    def test_an_untouched_picture_changes_next_to_nothing(self, atlas, tmp_path):
        save_atlas(atlas, tmp_path, {})
        edited = dict(read_picture(tmp_path / f"{name}.png", atlas) for name in atlas.names)
        assert edited.keys() == {0, 1}
        assert (atlas.render(edited) - atlas.render()).abs().max() < 1.5 / 255

    def test_an_edit_reaches_its_layer_in_every_frame(self, clip, atlas, tmp_path):
        save_atlas(atlas, tmp_path, {})
        picture = np.array(PIL.Image.open(tmp_path / "foreground.png"))
        picture[..., :3] = (0, 255, 0)
        index, colors = read_picture(save(tmp_path / "foreground-green.png", picture), atlas)
        changed = atlas.render({index: colors}).permute(0, 2, 3, 1).numpy()
        inside, outside = clip.masks > 0.95, clip.masks < 0.01
        assert abs(changed[inside] - (0, 1, 0)).mean() < 0.05
        assert (
            abs(changed[outside] - atlas.render().permute(0, 2, 3, 1).numpy()[outside]).mean()
            < 0.01
        )

    def test_erased_alpha_takes_the_object_away(self, clip, atlas, tmp_path):
        save_atlas(atlas, tmp_path, {})
        picture = np.array(PIL.Image.open(tmp_path / "foreground.png"))
        picture[..., 3] = 0
        index, colors = read_picture(save(tmp_path / "foreground.png", picture), atlas)
        shown = atlas.render({index: colors}).permute(0, 2, 3, 1).numpy()
        gone = abs(shown - clip.frames / 255)[clip.masks > 0.95]
        assert gone.mean() > 0.2

    def test_pictures_that_do_not_fit(self, atlas, tmp_path):
        save_atlas(atlas, tmp_path, {})
        path = save(tmp_path / "background-2.png", np.zeros((5, 7, 3), np.uint8))
        with pytest.raises(AtlasError, match="is 7 x 5 pixels, the background atlas"):
            read_picture(path, atlas)
        other = save(tmp_path / "mine.png", np.zeros((5, 7, 3), np.uint8))
        with pytest.raises(AtlasError, match="cannot tell which layer"):
            read_picture(other, atlas)
        with pytest.raises(AtlasError, match="'sky' is no layer"):
            read_picture(other, atlas, "sky")
        with pytest.raises(AtlasError, match="it does not exist"):
            read_picture(tmp_path / "none.png", atlas)
        (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
        with pytest.raises(AtlasError, match="it is no picture"):
            read_picture(tmp_path / "text.png", atlas)


class TestCommands:
    def test_atlas_writes_all_and_says_how_good_it_is(self, written, capsys):
        names = sorted(path.name for path in (written / "out").iterdir())
        assert names == [MODEL, "background.png", "foreground.png", "reconstruction.mp4"]
        _, info = load_atlas(written / "out")
        assert info["psnr"] > 30 and info["cut"]["frames"] == 5
        assert len(read_video(written / "out" / "reconstruction.mp4")) == 5

    def test_edit_renders_from_a_picture(self, written, capsys):
        picture = np.array(PIL.Image.open(written / "out" / "background.png"))
        edited = save(written / "out" / "background-inverted.png", 255 - picture)
        result = written / "edited.mp4"
        assert (
            main(["edit", str(written / "clip"), "--atlas", str(edited), "-o", str(result)]) == 0
        )
        before = read_video(written / "clip").frames.astype(int)
        assert abs(read_video(result).frames[:, :8, :8] - (255 - before[:, :8, :8])).mean() < 12
        assert "from the edited background" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["--prompt", "a star"], "--atlas renders without a model: leave out --prompt"),
            (["--atlas-layer", "sky"], "'sky' is no layer"),
            (["--atlas-dir", "nowhere"], "no atlas in"),
        ],
    )
    def test_edit_says_what_is_wrong(self, written, capsys, arguments, complaint):
        picture = written / "out" / "background.png"
        command = ["edit", str(written / "clip"), "--atlas", str(picture), *arguments]
        assert main([*command, "-o", str(written / "not.mp4")]) == 2
        assert complaint in last_line(capsys)
        assert not (written / "not.mp4").exists()

    def test_another_clip_is_refused(self, written, capsys):
        frames = heldout_scene(7, num_frames=5).render(64, 64).frames
        write_video(written / "other", frames, 8)
        picture = written / "out" / "background.png"
        command = ["edit", str(written / "other"), "--atlas", str(picture)]
        assert main([*command, "-o", str(written / "not.mp4")]) == 2
        assert "the atlas was made from clip, not from" in last_line(capsys)

    def test_the_sound_of_the_clip_is_kept(self, tmp_path, capsys):
        frames = heldout_scene(3, num_frames=4).render(64, 64).frames
        sound = ("aac", 0.3 * np.sin(np.arange(24000) / 9, dtype=np.float32), 48000, 0)
        clip, out = encode(tmp_path / "clip.mp4", frames, sound=sound), tmp_path / "out"
        assert main(["atlas", str(clip), "-o", str(out), "--steps", "1", "--points", "64"]) == 0
        assert read_video(out / "reconstruction.mp4").audio is not None
        picture = ["--atlas", str(out / "background.png")]
        result = tmp_path / "edited.mp4"
        assert main(["edit", str(clip), *picture, "-o", str(result)]) == 0
        assert read_video(result).audio is not None
        assert main(["edit", str(clip), *picture, "--no-audio", "-o", str(result)]) == 0
        assert read_video(result).audio is None
        assert "the sound is" not in capsys.readouterr().out
        assert main(["edit", *picture, "-o", str(result)]) == 0
        assert "the sound is left out: give the clip to keep it" in capsys.readouterr().out

    def test_a_cut_and_a_wrong_mask_are_one_line(self, written, tmp_path, capsys):
        frames = heldout_scene(3, num_frames=2).render(64, 64).frames
        write_video(tmp_path / "cut", np.concatenate([frames, 255 - frames]), 8)
        assert main(["atlas", str(tmp_path / "cut"), "-o", str(tmp_path / "out")]) == 2
        assert "no optical flow from frame 1 to 2" in last_line(capsys)
        command = ["atlas", str(written / "clip"), "-o", str(tmp_path / "out"), "--frames", "3"]
        assert main([*command, "--mask", str(written / "mask")]) == 2
        assert "5 masks, 3 frames are taken" in last_line(capsys)
        assert not (tmp_path / "out").exists()


def test_points_of_the_grid_are_pixel_centres(atlas):
    assert isinstance(atlas, LayeredAtlas)
    grid = atlas.grid().view(64, 64, 2)
    assert grid[0, 0].tolist() == [1 / 64 - 1, 1 / 64 - 1]
    assert grid[0, 1, 0] > grid[0, 0, 0] and grid[1, 0, 1] > grid[0, 0, 1]
