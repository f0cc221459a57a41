"""The shapes world's own classifier, and the metrics of an edit against its exact truth.

Pictures are uint8 [H, W, 3] or floats in [0, 1] of the same shape; clips have a frame axis in
front. The definitions are the same everywhere in the package: see `target_accuracy`,
`background_psnr` and `temporal_error`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from tvkernels.demo.world import (
    BACKGROUND_COLORS,
    OBJECT_COLORS,
    SHAPES,
    Clip,
    Scene,
    shape_distance,
)

_GRID = 44
# Side of the fitted window, in square roots of the object's area: the star, the least compact
# shape, reaches 1.9 of those across.
_WINDOW = 2.4
_MIN_AREA = 0.004
_MIN_IOU = 0.6
_SYMMETRY = {"circle": 0, "ring": 0, "square": 4, "triangle": 3, "star": 5, "cross": 4}


@dataclass(frozen=True)
class Reading:
    """What the classifier sees in one picture.

    Attributes:
        color: nearest palette name of the largest saturated region.
        shape: best fitting shape, or None if nothing fits with IoU 0.6.
        iou: soft intersection over union of that fit, in [0, 1].
        center: (x, y) of the region, in pixels.
        area: its area in pixels.
    """

    color: str
    shape: str | None
    iou: float
    center: tuple[float, float]
    area: float


def read(frame: np.ndarray, hint: np.ndarray | None = None) -> Reading | None:
    """Finds and names the object of a picture.

    Pixels nearer to an object colour than to any shade of any background colour are segmented;
    the largest connected region is the object. Its colour is the palette colour nearest to the
    region's median. Its coverage, the projection of each pixel onto the line from the
    surrounding background's median to the object's median, is compared with every shape at
    every rotation, three scales and nine offsets; the largest soft IoU wins.

    Args:
        frame: picture.
        hint: optional mask [H, W] in [0, 1]: look only at and near the pixels it covers. With
            two objects in the picture it says which one is meant.

    Returns:
        the reading, or None if no region has 0.4 % of the picture's area.
    """
    picture = _as_float(frame)
    labels = _nearest(picture)
    foreground = labels < len(OBJECT_COLORS)
    if hint is not None:
        foreground = foreground & _near(hint)
    region = _largest_region(foreground)
    if region is None or region.sum() < _MIN_AREA * region.size:
        return None
    inner = np.median(picture[region], axis=0)
    color = min(OBJECT_COLORS, key=lambda name: _distance(inner, OBJECT_COLORS[name]))
    coverage, center = _coverage(picture, region, foreground, inner)
    shape, iou = _fit(coverage, center)
    area = float(coverage.sum())
    return Reading(color, shape if iou >= _MIN_IOU else None, iou, center, area)


def classify(frame: np.ndarray, hint: np.ndarray | None = None) -> tuple[str, str] | None:
    """(colour, shape) of a picture's object, or None if no object or no shape is found.

    Arguments are those of `read`.
    """
    reading = read(frame, hint)
    if reading is None or reading.shape is None:
        return None
    return reading.color, reading.shape


def target_accuracy(frames: np.ndarray, target_scene: Scene) -> dict[str, float]:
    """Share of frames whose object the classifier names with the target's colour and shape.

    In a scene of one object the whole picture is searched, wherever the object is; with two,
    the neighbourhood of the first object's true mask.

    Args:
        frames: clip [F, H, W, 3] with F = `target_scene.num_frames`.

    Returns:
        {"both", "color", "shape"}: shares in [0, 1].

    Raises:
        ValueError: if the number of frames differs.
    """
    frames = _clip(frames, target_scene)
    wanted = target_scene.objects[0]
    color = shape = both = 0
    for f, frame in enumerate(frames):
        hint = None
        if len(target_scene.objects) > 1:
            hint = wanted.coverage(f, *frame.shape[:2])
        reading = read(frame, hint)
        if reading is not None:
            color += reading.color == wanted.color
            shape += reading.shape == wanted.shape
            both += reading.color == wanted.color and reading.shape == wanted.shape
    count = len(frames)
    return {"both": both / count, "color": color / count, "shape": shape / count}


def background_psnr(frames: np.ndarray, source_clip: Clip, target_clip: Clip) -> float:
    """PSNR in dB against the source, outside the union of both true masks of the edited object.

    10 log10(1 / MSE), the squared error averaged over all frames, channels and pixels that
    neither mask touches. Infinite for identical pixels.

    Raises:
        ValueError: if the shapes differ.
    """
    frames = _as_float(frames)
    if frames.shape != source_clip.frames.shape:
        raise ValueError(f"frames are {frames.shape}, the source {source_clip.frames.shape}")
    outside = (source_clip.masks == 0) & (target_clip.masks == 0)
    error = (frames - _as_float(source_clip.frames))[outside]
    mean = float(np.square(error, dtype=np.float64).mean())
    return math.inf if mean == 0 else -10 * math.log10(mean)


def temporal_error(frames: np.ndarray, target_scene: Scene) -> dict[str, float]:
    """Mean absolute difference after carrying each frame onto the next by the known motion.

    For every f, frame f is resampled bilinearly with the map of the object (each object of the
    scene in turn) and with the shift of the background, and compared with frame f + 1. A pixel
    counts as object if the object's true mask covers it wholly in frame f + 1 and, carried, in
    frame f; as background if no mask touches it in either. Pixels carried from outside the
    picture and those on outlines are left out.

    Args:
        frames: clip [F, H, W, 3] with F = `target_scene.num_frames` of at least 2.

    Returns:
        {"object", "background", "all"}: means over pixels and channels, in units of the whole
        range ([0, 1]). "all" is the mean over both kinds of pixels together.

    Raises:
        ValueError: if the number of frames differs or is below 2.
    """
    frames = _as_float(_clip(frames, target_scene))
    if len(frames) < 2:
        raise ValueError("a temporal error needs at least 2 frames")
    height, width = frames.shape[1:3]
    things = target_scene.objects
    masks = np.stack(
        [[thing.coverage(f, height, width) for f in range(len(frames))] for thing in things]
    )
    sums, counts = {"object": 0.0, "background": 0.0}, {"object": 0, "background": 0}
    for f in range(len(frames) - 1):
        warps = [target_scene.object_warp(f, height, width, k) for k in range(len(things))]
        shift = target_scene.background_shift(f, height, width)
        warps.append(np.array([[1, 0, shift[0]], [0, 1, shift[1]]], np.float64))
        union = masks.max(axis=0)
        for k, warp in enumerate(warps):
            kind = "object" if k < len(things) else "background"
            now = 1 - masks[k] if kind == "object" else union
            stack = np.concatenate([frames[f], now[f][..., None]], axis=-1)
            carried, inside = carry(stack, warp)
            counted = inside & (carried[..., 3] < 1e-6) & (now[f + 1] == 0)
            difference = np.abs(carried[..., :3] - frames[f + 1])[counted]
            sums[kind] += float(difference.sum(dtype=np.float64))
            counts[kind] += difference.size
    result = {kind: sums[kind] / max(counts[kind], 1) for kind in sums}
    result["all"] = sum(sums.values()) / max(sum(counts.values()), 1)
    return result


def carry(frame: np.ndarray, warp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Resamples a picture by a map from its coordinates to the new picture's.

    Args:
        frame: float [H, W, C].
        warp: [2, 3], as `Scene.object_warp` returns.

    Returns:
        the picture carried along, bilinear [H, W, C], and bool [H, W]: where all four samples
        lay within the picture.
    """
    height, width = frame.shape[:2]
    inverse = np.linalg.inv(warp[:, :2])
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    dx, dy = x - warp[0, 2], y - warp[1, 2]
    column = inverse[0, 0] * dx + inverse[0, 1] * dy - 0.5
    row = inverse[1, 0] * dx + inverse[1, 1] * dy - 0.5
    inside = (column >= 0) & (column <= width - 1) & (row >= 0) & (row <= height - 1)
    return _bilinear(frame, row, column), inside


def _bilinear(frame: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Samples [H, W, C] at fractional rows and columns, clamped to the border."""
    height, width = frame.shape[:2]
    row, column = np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)
    top = np.minimum(row.astype(np.int64), max(height - 2, 0))
    left = np.minimum(column.astype(np.int64), max(width - 2, 0))
    down, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    v, u = (row - top)[..., None], (column - left)[..., None]
    upper = frame[top, left] * (1 - u) + frame[top, right] * u
    lower = frame[down, left] * (1 - u) + frame[down, right] * u
    return upper * (1 - v) + lower * v


def _as_float(frames: np.ndarray) -> np.ndarray:
    frames = np.asarray(frames)
    if frames.dtype == np.uint8:
        return frames.astype(np.float32) / 255
    return frames.astype(np.float32, copy=False)


def _clip(frames: np.ndarray, scene: Scene) -> np.ndarray:
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) != scene.num_frames:
        wanted = f"[{scene.num_frames}, H, W, 3]"
        raise ValueError(f"frames must be {wanted}, not {list(frames.shape)}")
    return frames


def _distance(color: np.ndarray, reference: tuple[int, int, int]) -> float:
    return float(np.abs(color - np.array(reference) / 255).sum())


def _nearest(picture: np.ndarray) -> np.ndarray:
    """Index of each pixel's nearest colour, object colours first; int [H, W]."""
    objects = [np.array(color) for color in OBJECT_COLORS.values()]
    shades = [
        np.array(color) * factor
        for color in BACKGROUND_COLORS.values()
        for factor in (0.7, 0.85, 1.0, 1.15, 1.3)
    ]
    palette = np.array(objects + shades, np.float32) / 255
    # The squared distance less the pixel's own norm, which is the same for all colours.
    scores = picture.reshape(-1, 3) @ (-2 * palette.T) + np.square(palette).sum(1)
    return scores.argmin(1).reshape(picture.shape[:2])


def _near(hint: np.ndarray, margin: int = 6) -> np.ndarray:
    """The hint's pixels and those up to `margin` pixels off in either direction."""
    grown = np.pad(np.asarray(hint) > 0, margin)
    for axis in (0, 1):
        grown = np.logical_or.reduce(
            [np.roll(grown, offset, axis) for offset in range(-margin, margin + 1)]
        )
    return grown[margin:-margin, margin:-margin]


def _largest_region(mask: np.ndarray) -> np.ndarray | None:
    """The largest 4-connected region of a boolean picture, or None if it is empty.

    Runs of each row are joined with the runs they touch in the row above.
    """
    runs: list[tuple[int, int, int]] = []
    parent: list[int] = []

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    above: list[int] = []
    for row in range(len(mask)):
        edges = np.flatnonzero(np.diff(mask[row].astype(np.int8), prepend=0, append=0))
        current = []
        for left, right in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            index = len(runs)
            runs.append((row, left, right))
            parent.append(index)
            current.append(index)
            for other in above:
                if runs[other][1] < right and left < runs[other][2]:
                    parent[root(other)] = root(index)
        above = current
    if not runs:
        return None
    sizes: dict[int, int] = {}
    for index, (_, left, right) in enumerate(runs):
        sizes[root(index)] = sizes.get(root(index), 0) + right - left
    best = max(sizes, key=sizes.__getitem__)
    region = np.zeros_like(mask, dtype=bool)
    for index, (row, left, right) in enumerate(runs):
        if root(index) == best:
            region[row, left:right] = True
    return region


def _coverage(
    picture: np.ndarray, region: np.ndarray, foreground: np.ndarray, inner: np.ndarray
) -> tuple[np.ndarray, tuple[float, float]]:
    """The region's soft coverage [H, W] and its centroid (x, y) in pixels."""
    around = _near(region, 2)
    ring = _near(region, 6) & ~around & ~foreground
    outer = np.median(picture[ring], axis=0) if ring.any() else np.zeros(3, np.float32)
    line = inner - outer
    length = max(float(line @ line), 1e-6)
    coverage = np.clip((picture - outer) @ line / length, 0, 1) * around
    # A textured background projects to a little more or less than nothing.
    coverage = np.clip((coverage - 0.2) / 0.6, 0, 1)
    total = max(float(coverage.sum()), 1e-6)
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]] + 0.5
    return coverage, (float((coverage * x).sum() / total), float((coverage * y).sum() / total))


def _fit(coverage: np.ndarray, center: tuple[float, float]) -> tuple[str, float]:
    """The shape that fits best, and its soft IoU."""
    names, templates, sums = _templates()
    side = math.sqrt(max(float(coverage.sum()), 1.0)) * _WINDOW
    best_name, best = SHAPES[0], 0.0
    offsets = (np.arange(_GRID) + 0.5) / _GRID - 0.5
    for dx in (-0.02, 0.0, 0.02):
        for dy in (-0.02, 0.0, 0.02):
            column = center[0] + (offsets + dx) * side - 0.5
            row = center[1] + (offsets + dy) * side - 0.5
            grid = np.broadcast_arrays(row[:, None], column[None, :])
            window = _bilinear(coverage[..., None], *grid)[..., 0].ravel().astype(np.float32)
            outside = (grid[0] < 0) | (grid[0] > len(coverage) - 1)
            outside |= (grid[1] < 0) | (grid[1] > coverage.shape[1] - 1)
            window[outside.ravel()] = 0
            common = np.minimum(templates, window).sum(1)
            iou = common / (sums + window.sum() - common)
            index = int(iou.argmax())
            if iou[index] > best:
                best_name, best = names[index], float(iou[index])
    return best_name, best


@cache
def _templates() -> tuple[list[str], np.ndarray, np.ndarray]:
    """All shapes at unit area, every 6 degrees and three scales: names, [T, grid], sums [T]."""
    offsets = ((np.arange(_GRID) + 0.5) / _GRID - 0.5) * _WINDOW
    x, y = np.meshgrid(offsets, offsets)
    pixel = _WINDOW / _GRID
    fine = (np.arange(400) + 0.5) / 200 - 1
    names, templates = [], []
    for shape in SHAPES:
        share = (shape_distance(shape, *np.meshgrid(fine, fine)) < 0).mean() * 4
        fold = _SYMMETRY[shape]
        turns = np.arange(0, 2 * math.pi / fold, math.radians(6)) if fold else [0.0]
        for scale in (0.95, 1.0, 1.05):
            radius = scale / math.sqrt(share)
            for turn in turns:
                cos, sin = math.cos(turn) / radius, math.sin(turn) / radius
                distance = shape_distance(shape, x * cos + y * sin, y * cos - x * sin) * radius
                names.append(shape)
                templates.append(np.clip(0.5 - distance / pixel, 0, 1).ravel())
    stack = np.array(templates, np.float32)
    return names, stack, stack.sum(1)
