"""The shapes world: short clips whose every pixel, mask, motion and edit is known exactly.

A `Scene` holds one or two flat, saturated shapes that move, turn and scale linearly over a
muted, textured, panning background. Since a scene is rendered from its description, an edit of
it ("a red circle ..." to "a blue star ...") has an exact ground-truth clip.

Units. Positions are fractions of the picture's width and height, lengths (radius, texture
period, panning) are fractions of its shorter side, angles are radians, rates are per frame.
Pixel coordinates are continuous: pixel (row i, column j) has its centre at (x = j + 0.5,
y = i + 0.5). Colours are 8-bit sRGB values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

OBJECT_COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (45, 85, 240),
    "yellow": (245, 220, 45),
    "purple": (175, 50, 215),
    "cyan": (50, 220, 230),
    "white": (242, 242, 242),
}
BACKGROUND_COLORS: dict[str, tuple[int, int, int]] = {
    "gray": (98, 98, 98),
    "brown": (110, 76, 54),
    "navy": (38, 46, 88),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
TEXTURES = ("plain", "striped", "checkered", "wavy", "dotted")
HELDOUT_START = 1_000_000

# Radii that survive 8 x 8 averaging: 20 to 34 pixels of 128 for one object.
_RADII = {1: (0.16, 0.27), 2: (0.14, 0.19)}
_CONTRAST = 0.22
_RING_HOLE = 0.5
_CROSS_ARM = 0.34
_STAR_INNER = 0.45


def shape_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to a shape of radius 1 centred on the origin, negative inside.

    Every shape has its centroid on the origin and fits the circle of radius 1.

    Args:
        shape: one of `SHAPES`.
        x, y: coordinates (y downwards), broadcastable arrays in units of the radius.

    Raises:
        ValueError: if the shape is unknown.
    """
    if shape == "circle":
        return np.hypot(x, y) - 1.0
    if shape == "ring":
        middle, half = (1.0 + _RING_HOLE) / 2, (1.0 - _RING_HOLE) / 2
        return np.abs(np.hypot(x, y) - middle) - half
    if shape == "square":
        half = math.sqrt(0.5)
        dx, dy = np.abs(x) - half, np.abs(y) - half
        return _box(dx, dy)
    if shape == "cross":
        ax, ay = np.abs(x), np.abs(y)
        reach = math.sqrt(1.0 - _CROSS_ARM**2)
        upright = _box(ax - _CROSS_ARM, ay - reach)
        level = _box(ax - reach, ay - _CROSS_ARM)
        return np.minimum(upright, level)
    if shape == "triangle":
        return _folded_polygon(x, y, 3, 0.5)
    if shape == "star":
        return _folded_polygon(x, y, 5, _STAR_INNER)
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def _box(dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _folded_polygon(x: np.ndarray, y: np.ndarray, points: int, inner: float) -> np.ndarray:
    """Distance to a star with `points` tips at radius 1 (one at the top), corners at `inner`.

    The plane is folded into the half sector between a tip and the next corner, where the
    outline is one segment. A regular polygon is the star with inner = cos(pi / points).
    """
    half = math.pi / points
    folded = np.abs((np.arctan2(x, -y) + half) % (2 * half) - half)
    radius = np.hypot(x, y)
    px, py = radius * np.cos(folded) - 1.0, radius * np.sin(folded)
    ex, ey = inner * math.cos(half) - 1.0, inner * math.sin(half)
    along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0.0, 1.0)
    distance = np.hypot(px - along * ex, py - along * ey)
    return np.where(px * ey - py * ex > 0, distance, -distance)


@dataclass(frozen=True)
class Thing:
    """One moving object of a scene.

    Attributes:
        shape: one of `SHAPES`.
        color: a name of `OBJECT_COLORS`.
        start, velocity: (x, y) position at frame 0 and its change per frame, as fractions of
            width and height.
        radius, growth: circumscribed radius at frame 0 and its change per frame, as fractions
            of the shorter side.
        angle, spin: rotation at frame 0 (radians, clockwise on screen) and its change per frame.
    """

    shape: str
    color: str
    start: tuple[float, float]
    velocity: tuple[float, float]
    radius: float
    growth: float
    angle: float
    spin: float

    def pose(self, frame: float, height: int, width: int) -> tuple[float, float, float, float]:
        """(x, y, radius, angle) at a frame; the first three in pixels."""
        x = (self.start[0] + self.velocity[0] * frame) * width
        y = (self.start[1] + self.velocity[1] * frame) * height
        radius = (self.radius + self.growth * frame) * min(height, width)
        return x, y, radius, self.angle + self.spin * frame

    def coverage(self, frame: float, height: int, width: int) -> np.ndarray:
        """Share of each pixel the object covers, float32 [H, W] in [0, 1].

        The share is that of a straight edge at the pixel's signed distance, exact for axis
        parallel edges; it is the very weight the object is composited with.
        """
        x, y, radius, angle = self.pose(frame, height, width)
        mask = np.zeros((height, width), np.float32)
        left, right = max(0, int(x - radius - 1)), min(width, int(x + radius + 2))
        top, bottom = max(0, int(y - radius - 1)), min(height, int(y + radius + 2))
        if left >= right or top >= bottom:
            return mask
        dx = (np.arange(left, right, dtype=np.float32) + 0.5 - x)[None, :] / radius
        dy = (np.arange(top, bottom, dtype=np.float32) + 0.5 - y)[:, None] / radius
        cos, sin = math.cos(angle), math.sin(angle)
        distance = shape_distance(self.shape, dx * cos + dy * sin, dy * cos - dx * sin) * radius
        mask[top:bottom, left:right] = np.clip(0.5 - distance, 0.0, 1.0)
        return mask


@dataclass(frozen=True)
class Background:
    """A muted texture that pans.

    Attributes:
        color: a name of `BACKGROUND_COLORS`.
        texture: one of `TEXTURES`.
        angle: direction of the texture, radians.
        period: its wave length, as a fraction of the shorter side.
        phase: (u, v) offset, in periods.
        pan: (x, y) shift per frame, as fractions of the shorter side.
    """

    color: str
    texture: str
    angle: float
    period: float
    phase: tuple[float, float]
    pan: tuple[float, float]

    def shade(self, frame: float, height: int, width: int) -> np.ndarray:
        """Texture value in [-1, 1] per pixel, float32 [H, W]; zero where plain."""
        if self.texture == "plain":
            return np.zeros((height, width), np.float32)
        side = min(height, width)
        x = (np.arange(width, dtype=np.float32) + 0.5)[None, :] / side - self.pan[0] * frame
        y = (np.arange(height, dtype=np.float32) + 0.5)[:, None] / side - self.pan[1] * frame
        scale = 2 * math.pi / self.period
        cos, sin = math.cos(self.angle) * scale, math.sin(self.angle) * scale
        u = x * cos + y * sin + 2 * math.pi * self.phase[0]
        v = y * cos - x * sin + 2 * math.pi * self.phase[1]
        if self.texture == "striped":
            return np.sin(u)
        if self.texture == "checkered":
            return np.tanh(2.0 * np.sin(u) * np.sin(v)) / math.tanh(2.0)
        if self.texture == "wavy":
            return np.sin(u + 1.1 * np.sin(v * 0.65))
        if self.texture == "dotted":
            return 2.0 * np.square((0.5 + 0.5 * np.cos(u)) * (0.5 + 0.5 * np.cos(v))) - 1.0
        raise ValueError(f"unknown texture {self.texture!r}; known: {', '.join(TEXTURES)}")


@dataclass(frozen=True)
class Clip:
    """A rendered scene.

    Attributes:
        frames: uint8 [F, H, W, 3].
        masks: float32 [F, H, W], exact coverage of the first object, the one edits change.
        caption: the scene's caption.
        scene: the scene itself.
        object_masks: float32 [objects, F, H, W], the same for every object.
    """

    frames: np.ndarray
    masks: np.ndarray
    caption: str
    scene: Scene
    object_masks: np.ndarray


@dataclass(frozen=True)
class Scene:
    """A clip of the shapes world, described; `render` draws it.

    Attributes:
        objects: one or two objects, which overlap in no frame. Edits change the first.
        background: the panning texture.
        num_frames: number of frames, 1 or more.
    """

    objects: tuple[Thing, ...]
    background: Background
    num_frames: int = 8

    @classmethod
    def random(cls, seed: int, num_frames: int = 8, objects: int = 1) -> Scene:
        """The scene of a seed; same arguments, same scene.

        The path, turn and growth over the whole clip do not depend on `num_frames`, so more
        frames mean slower motion. Seeds from `HELDOUT_START` on are kept out of training.

        Raises:
            ValueError: if `objects` is not 1 or 2 or `num_frames` is below 1.
        """
        if objects not in (1, 2):
            raise ValueError(f"a scene holds 1 or 2 objects, not {objects}")
        if num_frames < 1:
            raise ValueError(f"a scene has at least 1 frame, not {num_frames}")
        rng = np.random.default_rng([seed, objects])
        steps = max(num_frames - 1, 1)
        background = _random_background(rng, steps)
        colors = rng.permutation(list(OBJECT_COLORS))[:objects]
        shapes = [SHAPES[rng.integers(len(SHAPES))] for _ in range(objects)]
        while True:
            things = tuple(
                _random_thing(rng, shape, str(color), steps, objects)
                for shape, color in zip(shapes, colors, strict=True)
            )
            if objects == 1 or _disjoint(*things, steps):
                return cls(things, background, num_frames)

    @property
    def caption(self) -> str:
        """For instance "a red circle and a blue star on a gray striped background"."""
        things = " and ".join(f"a {thing.color} {thing.shape}" for thing in self.objects)
        return f"{things} on a {self.background.color} {self.background.texture} background"

    def edit(self, color: str | None = None, shape: str | None = None) -> Scene:
        """The same scene and motion, the first object in another colour or shape (or both).

        Raises:
            ValueError: if the colour or shape is none of the world's.
        """
        if color is not None and color not in OBJECT_COLORS:
            raise ValueError(f"unknown colour {color!r}; known: {', '.join(OBJECT_COLORS)}")
        if shape is not None and shape not in SHAPES:
            raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
        first = self.objects[0]
        first = replace(first, color=color or first.color, shape=shape or first.shape)
        return replace(self, objects=(first, *self.objects[1:]))

    def render_frame(
        self, frame: int, height: int = 128, width: int = 128
    ) -> tuple[np.ndarray, np.ndarray]:
        """One frame: picture uint8 [H, W, 3] and coverage float32 [objects, H, W]."""
        base = np.array(BACKGROUND_COLORS[self.background.color], np.float32)
        shade = self.background.shade(frame, height, width)
        picture = (1.0 + _CONTRAST * shade)[..., None] * base
        masks = np.stack([thing.coverage(frame, height, width) for thing in self.objects])
        for thing, mask in zip(self.objects, masks, strict=True):
            color = np.array(OBJECT_COLORS[thing.color], np.float32)
            picture += mask[..., None] * (color - picture)
        return (picture + 0.5).astype(np.uint8), masks

    def render(self, height: int = 128, width: int = 128) -> Clip:
        """All frames at a size.

        Raises:
            ValueError: if height or width is not a positive multiple of 8.
        """
        if height < 8 or width < 8 or height % 8 or width % 8:
            raise ValueError(f"height and width must be multiples of 8, not {height} x {width}")
        drawn = [self.render_frame(f, height, width) for f in range(self.num_frames)]
        masks = np.stack([mask for _, mask in drawn], axis=1)
        frames = np.stack([picture for picture, _ in drawn])
        return Clip(frames, masks[0], self.caption, self, masks)

    def object_warp(
        self, f: int, height: int = 128, width: int = 128, index: int = 0
    ) -> np.ndarray:
        """Map of an object's points from frame f to frame f + 1.

        Returns:
            float64 [2, 3]: [x', y'] = warp @ [x, y, 1], in continuous pixel coordinates.
        """
        x0, y0, r0, a0 = self.objects[index].pose(f, height, width)
        x1, y1, r1, a1 = self.objects[index].pose(f + 1, height, width)
        scale, turn = r1 / r0, a1 - a0
        cos, sin = scale * math.cos(turn), scale * math.sin(turn)
        return np.array(
            [
                [cos, -sin, x1 - cos * x0 + sin * y0],
                [sin, cos, y1 - sin * x0 - cos * y0],
            ]
        )

    def background_shift(self, f: int, height: int = 128, width: int = 128) -> tuple[float, float]:
        """(dx, dy) in pixels by which the background moves from frame f to frame f + 1."""
        side = min(height, width)
        return self.background.pan[0] * side, self.background.pan[1] * side


def heldout_scene(i: int, num_frames: int = 8, objects: int = 1) -> Scene:
    """The i-th scene kept out of training."""
    return Scene.random(HELDOUT_START + i, num_frames, objects)


def edit_pair(i: int, num_frames: int = 8, objects: int = 1) -> tuple[Scene, Scene]:
    """Held-out scene i and its edit: colour, shape or both changed, for i = 0, 1, 2 modulo 3."""
    source = heldout_scene(i, num_frames, objects)
    rng = np.random.default_rng([HELDOUT_START + i, 77])
    first = source.objects[0]
    used = {thing.color for thing in source.objects}
    color = str(rng.choice([name for name in OBJECT_COLORS if name not in used]))
    shape = str(rng.choice([name for name in SHAPES if name != first.shape]))
    return source, source.edit(
        color=color if i % 3 != 1 else None, shape=shape if i % 3 != 0 else None
    )


def _random_background(rng: np.random.Generator, steps: int) -> Background:
    names = list(BACKGROUND_COLORS)
    heading, reach = rng.uniform(0, 2 * math.pi), rng.uniform(0.1, 0.25)
    return Background(
        color=names[rng.integers(len(names))],
        texture=TEXTURES[rng.integers(len(TEXTURES))],
        angle=rng.uniform(0, math.pi),
        period=rng.uniform(0.26, 0.4),
        phase=(rng.uniform(), rng.uniform()),
        pan=(reach * math.cos(heading) / steps, reach * math.sin(heading) / steps),
    )


def _random_thing(
    rng: np.random.Generator, shape: str, color: str, steps: int, objects: int
) -> Thing:
    low, high = _RADII[objects]
    radii = rng.uniform(low, high, 2)
    edge = radii + 0.02
    start = rng.uniform(edge[0], 1 - edge[0], 2)
    move = rng.uniform(-0.3, 0.3, 2)
    end = np.clip(start + move, edge[1], 1 - edge[1])
    angle = rng.uniform(-0.35, 0.35)
    turn = rng.uniform(-0.7, 0.7)
    return Thing(
        shape=shape,
        color=color,
        start=(float(start[0]), float(start[1])),
        velocity=(float(end[0] - start[0]) / steps, float(end[1] - start[1]) / steps),
        radius=float(radii[0]),
        growth=float(radii[1] - radii[0]) / steps,
        angle=float(angle),
        spin=float(turn) / steps,
    )


def _disjoint(a: Thing, b: Thing, steps: int) -> bool:
    """Whether two objects' circles stay apart in a square picture over the whole clip.

    Wider pictures only move them further apart, in units of the shorter side.
    """
    for t in np.linspace(0, steps, 33):
        ax, ay, ar, _ = a.pose(t, 1, 1)
        bx, by, br, _ = b.pose(t, 1, 1)
        if math.hypot(ax - bx, ay - by) < ar + br + 0.02:
            return False
    return True
