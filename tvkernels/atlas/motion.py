"""What an atlas starts from: moving objects and the affine motion of each layer, from flow."""

from __future__ import annotations

import numpy as np

from tvkernels.video import VideoError
from tvkernels.video.flow import Flow, opencv

# Where an object is looked for: pixels that differ from the background's median by more than so
# many levels in any channel, or that flow so many pixels unlike the background.
FOREIGN_LEVELS = 24
FOREIGN_PIXELS = 0.75
# Frames that the median is of, at most; specks under this share of a frame are no object.
MEDIAN_OF = 15
LEAST_SHARE = 0.002
# GrabCut's shorter side: it took 2.7 s a frame of 256 x 256, 0.16 s of 128 x 128 (wolf.mp4, one
# CPU core).
CUT_SIDE = 128
# Passes over the clip, the second without the first one's objects, and of GrabCut in each frame.
PASSES, CUTS = 2, 4


def affine_chain(flow: Flow, inside: np.ndarray) -> np.ndarray:
    """Affine maps of one layer from each frame into the middle one, from flow.

    Args:
        flow: of the clip.
        inside: bool [F, H, W], the layer's pixels.
    Returns:
        float64 [F, 2, 3]: [x', y'] = map @ [x, y, 1] in pixels, the middle frame's the identity.
    """
    frames = len(inside)
    steps = [_fit(flow.forward[f], flow.trusted[f] & inside[f]) for f in range(frames - 1)]
    chain = [np.eye(3)] * frames
    middle = frames // 2
    for f in reversed(range(middle)):
        chain[f] = chain[f + 1] @ steps[f]
    for f in range(middle + 1, frames):
        chain[f] = chain[f - 1] @ np.linalg.inv(steps[f - 1])
    return np.stack(chain)[:, :2]


def _fit(flow: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The affine map [3, 3] that most of the flow at these pixels follows."""
    y, x = np.nonzero(where)
    found = np.eye(3)
    if len(x) < 16:  # too few to tell more than that it stays
        return found
    pick = np.linspace(0, len(x) - 1, min(len(x), 4000)).astype(int)
    start = np.stack([x[pick], y[pick]], 1).astype(np.float32)
    end = start + flow[y[pick], x[pick]]
    map_, _ = opencv().estimateAffine2D(start, end, ransacReprojThreshold=1.0)
    # A map that folds or blows up is noise on a textureless layer: there the mean has to do.
    if map_ is None or not 0.5 < np.linalg.det(map_[:, :2]) < 2:
        found[:2, 2] = np.median(end - start, 0)
        return found
    found[:2] = map_
    return found


def subtract_background(frames: np.ndarray, flow: Flow, layers: int = 1) -> list[np.ndarray]:
    """Masks of what moves unlike the background.

    The background's affine motion, fitted robustly to the flow, carries frames into each other.
    What differs from their median, or flows otherwise, is a hint of an object; GrabCut (Rother et
    al. 2004) finds its outline by colour. On 20 scenes of the shapes world the median IoU with the
    true object is 0.93; where the background is striped, which hides its motion, it may fail, and
    a mask is needed. Several objects are the largest connected ones of the middle frame, followed
    through the others by the flow.

    Args:
        frames: uint8 [F, H, W, 3].
        flow: of them.
        layers: objects to tell apart, the largest first.
    Returns:
        A bool [F, H, W] for each.
    Raises:
        VideoError: nothing, or fewer objects, move unlike the background.
    """
    cv2 = opencv()
    found = np.zeros(frames.shape[:3], bool)
    for _ in range(PASSES):
        chain = affine_chain(flow, ~found)
        whole = np.concatenate([chain, np.tile([[[0.0, 0.0, 1.0]]], (len(chain), 1, 1))], 1)
        hints = _foreign_colors(cv2, frames, whole, found) | _foreign_motion(flow, whole)
        pairs = list(zip(frames, hints, strict=True))
        found = np.stack([_without_specks(cv2, _cut(cv2, *pair)) for pair in pairs])
        if not found.any():  # nothing of a colour of its own: what moves has to do
            found = np.stack([_without_specks(cv2, hint.astype(np.uint8)) for hint in hints])
        if not found.any():
            raise VideoError(
                "nothing moves unlike the background: give the object's mask with --mask"
            )
    return [found] if layers == 1 else _objects(cv2, found, flow, layers)


def _foreign_colors(cv2, frames, whole: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """Where each frame differs from the median of those around, without the known objects."""
    count, height, width = frames.shape[:3]
    chosen = np.unique(np.linspace(0, count - 1, MEDIAN_OF).astype(int))
    seen = np.where(objects, 0, 255).astype(np.uint8)
    foreign = np.zeros(objects.shape, bool)
    for f in range(count):
        views = []
        for g in chosen:
            there = (np.linalg.inv(whole[g]) @ whole[f])[:2]
            shown = cv2.warpAffine(
                np.dstack([frames[g], seen[g]]), there, (width, height),
                flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            ).astype(np.float32)  # fmt: skip
            shown[shown[..., 3] < 255] = np.nan
            views.append(shown[..., :3])
        # The lower median of the frames that show a pixel; NaN, which sorts last, where none does.
        # numpy's nanmedian took most of a minute for 24 frames of 256 x 256.
        ordered = np.sort(np.stack(views), 0)
        middle = np.maximum(np.isfinite(ordered).sum(0) - 1, 0) // 2
        plate = np.take_along_axis(ordered, middle[None], 0)[0]
        foreign[f] = np.abs(frames[f] - plate).max(-1) > FOREIGN_LEVELS
    return foreign


def _foreign_motion(flow: Flow, whole: np.ndarray) -> np.ndarray:
    """Where the flow to both neighbours leaves the background's motion."""
    count, (height, width) = len(whole), flow.forward.shape[1:3]
    y, x = np.mgrid[:height, :width]
    away = np.full((count, height, width), np.inf)
    for f in range(count):
        for g, moved in ((f + 1, flow.forward[f : f + 1]), (f - 1, flow.backward[f - 1 : f])):
            if 0 <= g < count:
                there = np.linalg.inv(whole[g]) @ whole[f]
                own = [there[k, 0] * x + there[k, 1] * y + there[k, 2] - at
                       for k, at in enumerate((x, y))]  # fmt: skip
                off = np.hypot(moved[0, ..., 0] - own[0], moved[0, ..., 1] - own[1])
                away[f] = np.minimum(away[f], off)
    return np.isfinite(away) & (away > FOREIGN_PIXELS)


def _cut(cv2, frame: np.ndarray, hint: np.ndarray) -> np.ndarray:
    """The object's outline by colour, from a rough hint: uint8 [H, W] of 0 and 1."""
    if not LEAST_SHARE < hint.mean() < 1 - LEAST_SHARE:
        return hint.astype(np.uint8)
    height, width = hint.shape
    scale = min(1, CUT_SIDE / min(height, width))
    small = max(1, round(width * scale)), max(1, round(height * scale))
    picture = cv2.resize(frame, small, interpolation=cv2.INTER_AREA)
    rough = cv2.resize(hint.astype(np.float32), small, interpolation=cv2.INTER_AREA) > 0.25
    # Nothing is looked for further from the hint than a tenth of the frame.
    reach = max(3, round(0.2 * min(small)) | 1)
    near = cv2.dilate(rough.astype(np.uint8), np.ones((reach, reach), np.uint8))
    state = np.where(near, cv2.GC_PR_BGD, cv2.GC_BGD).astype(np.uint8)
    state[rough] = cv2.GC_PR_FGD
    cv2.setRNGSeed(0)
    try:
        cv2.grabCut(
            np.ascontiguousarray(picture[..., ::-1]), state, None, np.zeros((1, 65)),
            np.zeros((1, 65)), CUTS, cv2.GC_INIT_WITH_MASK,
        )  # fmt: skip
    except cv2.error:  # too few colours to tell two mixtures apart
        return hint.astype(np.uint8)
    inside = np.isin(state, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.float32)
    return (cv2.resize(inside, (width, height)) > 0.5).astype(np.uint8)


def _without_specks(cv2, foreign: np.ndarray) -> np.ndarray:
    _, labels, stats, _ = cv2.connectedComponentsWithStats(foreign, connectivity=8)
    large = stats[:, cv2.CC_STAT_AREA] >= LEAST_SHARE * foreign.size
    large[0] = False
    return large[labels]


def _objects(cv2, found: np.ndarray, flow: Flow, layers: int) -> list[np.ndarray]:
    """`found` divided among the largest components of its middle frame."""
    middle = len(found) // 2
    _, labels, stats, _ = cv2.connectedComponentsWithStats(found[middle].astype(np.uint8))
    order = 1 + np.argsort(-stats[1:, cv2.CC_STAT_AREA])
    if len(order) < layers:
        raise VideoError(
            f"{len(order)} objects move unlike the background, not {layers}: give their masks "
            "with --mask, once for each"
        )
    named = np.zeros(found.shape, np.float32)
    for number, label in enumerate(order[:layers], 1):
        named[middle][labels == label] = number
    for f in (*reversed(range(middle)), *range(middle + 1, len(found))):
        toward = flow.forward[f] if f < middle else flow.backward[f - 1]
        x, y = np.meshgrid(np.arange(found.shape[2]), np.arange(found.shape[1]))
        x = np.clip(np.rint(x + toward[..., 0]).astype(int), 0, found.shape[2] - 1)
        y = np.clip(np.rint(y + toward[..., 1]).astype(int), 0, found.shape[1] - 1)
        carried = named[f + 1 if f < middle else f - 1][y, x]
        _, labels = cv2.connectedComponents(found[f].astype(np.uint8))
        for label in range(1, labels.max() + 1):
            votes = np.bincount(carried[labels == label].astype(int), minlength=layers + 1)
            if votes[1:].any():
                named[f][labels == label] = 1 + votes[1:].argmax()
    return [named == number for number in range(1, layers + 1)]
