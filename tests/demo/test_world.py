"""The shapes world: exact rendering, known motion, the classifier and the metrics."""

import math

import numpy as np
import pytest
from fresh import printed

from tvkernels.demo import metrics, world
from tvkernels.demo.world import OBJECT_COLORS, SHAPES, Scene, edit_pair, heldout_scene


def test_same_seed_same_bytes_and_other_seed_other_clip():
    first, again, other = (Scene.random(seed).render() for seed in (5, 5, 6))
    assert first.frames.tobytes() == again.frames.tobytes()
    assert first.caption == again.caption
    assert not np.array_equal(first.frames, other.frames)


def test_heldout_scenes_are_outside_the_training_seeds():
    assert heldout_scene(3) == Scene.random(1_000_003)


@pytest.mark.parametrize(("height", "width"), [(128, 128), (64, 64), (96, 160), (160, 96)])
def test_clip_has_the_asked_size(height, width):
    clip = heldout_scene(0, num_frames=9).render(height, width)
    assert clip.frames.shape == (9, height, width, 3) and clip.frames.dtype == np.uint8
    assert clip.masks.shape == (9, height, width) and clip.masks.dtype == np.float32


@pytest.mark.parametrize(("height", "width"), [(100, 128), (128, 4), (0, 0)])
def test_sizes_the_model_cannot_take_are_refused(height, width):
    with pytest.raises(ValueError, match="multiples of 8"):
        heldout_scene(0).render(height, width)


def test_unknown_names_and_counts_are_refused():
    with pytest.raises(ValueError, match="pink"):
        heldout_scene(0).edit(color="pink")
    with pytest.raises(ValueError, match="heart"):
        heldout_scene(0).edit(shape="heart")
    with pytest.raises(ValueError, match="3"):
        Scene.random(0, objects=3)
    with pytest.raises(ValueError, match="0"):
        Scene.random(0, num_frames=0)


def test_caption_grammar():
    scene = Scene.random(0).edit(color="cyan", shape="ring")
    background = scene.background
    expected = f"a cyan ring on a {background.color} {background.texture} background"
    assert scene.caption == expected
    two = Scene.random(0, objects=2)
    first, second = two.objects
    assert two.caption.startswith(
        f"a {first.color} {first.shape} and a {second.color} {second.shape} on a"
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_hold_the_area_of_the_shape(shape):
    """Coverage sums to the shape's area, by geometry that shares no code with the renderer."""
    scene = heldout_scene(4).edit(shape=shape)
    masks = scene.render(256, 256).masks
    hole, arm, inner = world._RING_HOLE, world._CROSS_ARM, world._STAR_INNER
    unit = {
        "circle": math.pi,
        "square": 2.0,
        "triangle": 0.75 * math.sqrt(3),
        "star": 5 * inner * math.sin(math.pi / 5),
        "ring": math.pi * (1 - hole**2),
        "cross": 8 * arm * math.sqrt(1 - arm**2) - 4 * arm**2,
    }[shape]
    for f, mask in enumerate(masks):
        radius = scene.objects[0].pose(f, 256, 256)[2]
        assert mask.sum() == pytest.approx(unit * radius**2, rel=0.005)
        assert mask.max() == 1 and mask.min() == 0


def test_frames_are_composited_with_the_masks():
    clip = heldout_scene(7).render()
    color = OBJECT_COLORS[clip.scene.objects[0].color]
    assert (clip.frames[clip.masks == 1] == color).all()
    other = clip.scene.edit(color="white" if color != OBJECT_COLORS["white"] else "red").render()
    changed = (clip.frames != other.frames).any(-1)
    assert not changed[clip.masks == 0].any()
    assert changed[clip.masks > 0.05].all()


def test_edit_keeps_motion_background_and_the_second_object():
    source = Scene.random(11, objects=2)
    target = source.edit(color="green", shape="star")
    for f in (0, 3, 7):
        assert target.objects[0].pose(f, 128, 128) == source.objects[0].pose(f, 128, 128)
        assert np.array_equal(target.object_warp(f), source.object_warp(f))
    assert target.objects[1] == source.objects[1]
    assert target.background == source.background
    assert (target.objects[0].color, target.objects[0].shape) == ("green", "star")


@pytest.mark.parametrize("objects", [1, 2])
def test_objects_stay_inside_and_apart(objects):
    for seed in range(60):
        masks = Scene.random(seed, num_frames=5, objects=objects).render(64, 64).object_masks
        border = np.concatenate(
            [masks[..., 0, :], masks[..., -1, :], masks[..., 0], masks[..., -1]], axis=-1
        )
        assert border.max() == 0
        assert (masks > 0.5).sum(axis=0).max() == 1


def test_edit_pairs_change_color_shape_or_both():
    for i in range(30):
        source, target = edit_pair(i)
        first, last = source.objects[0], target.objects[0]
        changed = (first.color != last.color, first.shape != last.shape)
        assert changed == [(True, False), (False, True), (True, True)][i % 3]
        assert edit_pair(i)[1] == target


def test_object_warp_carries_the_object():
    """A point of the object, carried by the warp, keeps its place within the object."""
    scene = heldout_scene(2)
    for f in range(7):
        x0, y0, r0, a0 = scene.objects[0].pose(f, 96, 160)
        x1, y1, r1, a1 = scene.objects[0].pose(f + 1, 96, 160)
        point = np.array([x0 + 0.6 * r0 * math.cos(a0 + 1), y0 + 0.6 * r0 * math.sin(a0 + 1), 1])
        wanted = [x1 + 0.6 * r1 * math.cos(a1 + 1), y1 + 0.6 * r1 * math.sin(a1 + 1)]
        assert scene.object_warp(f, 96, 160) @ point == pytest.approx(wanted)


def test_classifier_names_every_truth_and_every_edit():
    wrong = []
    for i in range(120):
        source, target = edit_pair(i)
        for scene in (source, target):
            frame = i % scene.num_frames
            picture, _ = scene.render_frame(frame)
            thing = scene.objects[0]
            if metrics.classify(picture) != (thing.color, thing.shape):
                wrong.append((i, frame, scene.caption))
    assert wrong == []


@pytest.mark.parametrize(("height", "width"), [(64, 64), (128, 192), (256, 256)])
def test_classifier_works_at_other_sizes(height, width):
    for i in range(12):
        thing = heldout_scene(i).objects[0]
        picture, _ = heldout_scene(i).render_frame(0, height, width)
        assert metrics.classify(picture) == (thing.color, thing.shape)


def test_classifier_with_a_hint_names_the_object_it_points_at():
    for i in range(10):
        scene = heldout_scene(i, objects=2)
        picture, masks = scene.render_frame(2)
        for thing, mask in zip(scene.objects, masks, strict=True):
            assert metrics.classify(picture, mask) == (thing.color, thing.shape)


def test_classifier_bears_noise_and_finds_nothing_on_a_background():
    rng = np.random.default_rng(0)
    right = 0
    for i in range(20):
        picture, _ = heldout_scene(i).render_frame(0)
        noisy = np.clip(picture + rng.normal(0, 12, picture.shape), 0, 255).astype(np.uint8)
        thing = heldout_scene(i).objects[0]
        right += metrics.classify(noisy) == (thing.color, thing.shape)
        scene = heldout_scene(i)
        base = np.array(world.BACKGROUND_COLORS[scene.background.color])
        empty = (1 + 0.22 * scene.background.shade(0, 128, 128))[..., None] * base
        assert metrics.classify(empty.astype(np.uint8)) is None
    assert right >= 19


def test_target_accuracy_tells_color_and_shape_apart():
    scene = heldout_scene(5)
    first = scene.objects[0]
    color = next(name for name in OBJECT_COLORS if name != first.color)
    shape = next(name for name in SHAPES if name != first.shape)
    frames = scene.render().frames
    cases = {
        scene: (1, 1, 1),
        scene.edit(color=color): (0, 0, 1),
        scene.edit(shape=shape): (0, 1, 0),
        scene.edit(color=color, shape=shape): (0, 0, 0),
    }
    for target, wanted in cases.items():
        result = metrics.target_accuracy(frames, target)
        assert (result["both"], result["color"], result["shape"]) == wanted
    half = frames.copy()
    half[:4] = scene.edit(color=color).render().frames[:4]
    assert metrics.target_accuracy(half, scene)["both"] == 0.5


def test_background_psnr_ignores_the_edit_and_counts_the_rest():
    source, target = (scene.render() for scene in edit_pair(2))
    assert metrics.background_psnr(target.frames, source, target) == math.inf
    off = np.clip(target.frames.astype(int) + 8, 0, 255).astype(np.uint8)
    assert metrics.background_psnr(off, source, target) == pytest.approx(
        20 * math.log10(255 / 8), abs=0.01
    )
    with pytest.raises(ValueError, match="frames are"):
        metrics.background_psnr(target.frames[:3], source, target)


@pytest.mark.parametrize("objects", [1, 2])
def test_temporal_error_is_small_on_truth_and_sees_flicker(objects):
    for i in range(6):
        scene = heldout_scene(i, objects=objects)
        clip = scene.render()
        truth = metrics.temporal_error(clip.frames, scene)
        assert truth["object"] < 1e-6 and truth["background"] < 0.004 and truth["all"] < 0.004
        flicker = clip.frames.astype(np.float32) / 255
        flicker[1::2] = np.clip(flicker[1::2] + 0.05, 0, 1)
        seen = metrics.temporal_error(flicker, scene)
        assert seen["background"] > 0.03 and seen["all"] > 0.03
        still = metrics.temporal_error(np.repeat(clip.frames[:1], 8, axis=0), scene)
        if scene.background.texture != "plain":
            assert still["background"] > 2 * truth["background"]


def test_temporal_error_tells_object_from_background():
    scene = heldout_scene(3)
    clip = scene.render()
    blink = clip.frames.copy()
    blink[1::2][clip.masks[1::2] == 1] = (10, 10, 10)
    seen = metrics.temporal_error(blink, scene)
    assert seen["object"] > 0.2 and seen["background"] < 0.004
    with pytest.raises(ValueError, match="2 frames"):
        metrics.temporal_error(clip.frames[:1], heldout_scene(3, num_frames=1))


def test_world_and_metrics_import_no_model_library():
    code = (
        "import sys, tvkernels.demo.world, tvkernels.demo.metrics;"
        "print('diffusers' in sys.modules, 'transformers' in sys.modules)"
    )
    assert printed(code).split() == ["False", "False"]
