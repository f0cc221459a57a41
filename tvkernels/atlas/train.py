"""Fits a layered atlas to a clip: a start from masks and flow, then the terms of Kasten et al."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tvkernels import atlas_composite, atlas_sample, atlas_splat
from tvkernels.atlas.model import LayeredAtlas
from tvkernels.atlas.motion import affine_chain, subtract_background
from tvkernels.video.flow import optical_flow

# Pixels' worth of a texel below which its colour is its neighbours'.
LEAST_COVER = 0.1


@dataclass(frozen=True)
class AtlasSettings:
    """Numbers of the training.

    Args:
        steps: of Adam; None takes as many as see every pixel 40 times, and 300 at least.
        points: pixels of the clip in each step, the same number in every frame; None takes a
            32nd of them, between 16,384 and 65,536.
        layers: foreground layers where no masks are given.
        texels: of an atlas for each pixel's side.
        largest: texels on an atlas's side at most (the paper's 2000).
        flow: "dis" or "farneback".
        colors, opacity, affine, bend: learning rates; they fall to a tenth along a cosine.
        rigidity, flow_weight, opacity_flow, sparsity, mask: weights beside the mean squared
            error of the colours; the last one for the first half of the steps only.
    """

    steps: int | None = None
    points: int | None = None
    layers: int = 1
    texels: float = 1.25
    largest: int = 2000
    flow: str = "dis"
    colors: float = 1e-2
    opacity: float = 1e-1
    affine: float = 3e-4
    bend: float = 1e-3
    rigidity: float = 1e-5
    flow_weight: float = 1e-4
    opacity_flow: float = 1e-4
    sparsity: float = 1e-4
    mask: float = 1e-3

    def of(self, frames: int, height: int, width: int) -> AtlasSettings:
        """The same with the numbers that a clip's size decides.

        24 frames of 256 x 256 (wolf.mp4) came back at 27.5 dB after 19 looks at every pixel and at
        29.7 dB after 47.
        """
        pixels = frames * height * width
        points = self.points or min(max(pixels // 32, 16_384), 65_536)
        steps = max(300, math.ceil(40 * pixels / points)) if self.steps is None else self.steps
        return replace(self, steps=steps, points=points)


def train_atlas(
    frames: np.ndarray,
    masks: Sequence[np.ndarray] | None = None,
    settings: AtlasSettings | None = None,
    *,
    generator: torch.Generator | None = None,
    device: str | torch.device = "cpu",
    on_step: Callable[[int, float], None] | None = None,
) -> LayeredAtlas:
    """Fits a layered atlas to a clip.

    Args:
        frames: uint8 [F, H, W, 3].
        masks: bool [F, H, W] of each foreground layer, the front one first; None finds what moves
            unlike the background.
        settings: numbers.
        generator: draws the pixels of each step.
        device: where it trains; the result stays there.
        on_step: called with the step's number and its loss.
    Returns:
        The atlas.
    Raises:
        VideoError: the flow fails, or no object is found.
    """
    settings = (settings or AtlasSettings()).of(*frames.shape[:3])
    device = torch.device(device)
    flow = optical_flow(frames, settings.flow)
    if masks is None:
        masks = subtract_background(frames, flow, settings.layers)
    rest = ~np.any(masks, 0)
    pixels = torch.from_numpy(frames).flatten(1, 2).to(device).float() / 255
    target = torch.stack([torch.from_numpy(np.ascontiguousarray(m)) for m in masks]).to(device)
    model = _start(pixels, [*masks, rest], flow, frames.shape, settings).to(device)
    trainer = _Trainer(model, settings, pixels, target.flatten(2).float(), flow, generator)
    for step in range(settings.steps):
        loss = trainer.step(step)
        if on_step is not None:
            on_step(step, loss)
    _clear(model.requires_grad_(False))
    return model


def psnr(model: LayeredAtlas, frames: np.ndarray) -> float:
    """Reconstruction of the clip in dB, over all pixels of all frames."""
    shown = model.render().permute(0, 2, 3, 1).cpu().numpy()
    return float(-10 * np.log10(np.square(shown - frames / 255.0).mean()))


def _start(pixels: Tensor, masks, flow, shape, settings: AtlasSettings) -> LayeredAtlas:
    """Affine maps from the flow, opacities from the masks, atlases from the pixels."""
    _, h, w, _ = shape
    affines, sizes = [], []
    for i, mask in enumerate(masks):
        chain = affine_chain(flow, mask)
        last = i == len(masks) - 1
        low, high = _extent(chain, np.ones_like(mask) if last else mask, margin=0 if last else 4)
        side = np.clip(np.ceil((high - low) * settings.texels), 4, settings.largest).astype(int)
        affines.append(torch.from_numpy(_normalised(chain, low, high, h, w)))
        sizes.append((int(side[1]), int(side[0])))
    opacity = [_soft(torch.from_numpy(np.ascontiguousarray(m))) for m in masks[:-1]]
    model = LayeredAtlas(affines, sizes, opacity).to(pixels.device)
    for i, layer in enumerate(model.layers):
        weight = torch.from_numpy(np.ascontiguousarray(masks[i])).to(pixels).reshape(1, -1)
        uv = model.uv_maps(i).reshape(1, -1, 2)
        picture, cover = atlas_splat(pixels.reshape(1, -1, 3), uv, layer.size, weight=weight)
        layer.colors.data.copy_(filled(picture[0], cover[0]))
    return model


def _extent(chain: np.ndarray, mask: np.ndarray, margin: int) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest (x, y) of a layer's pixels in the middle frame's coordinates."""
    corners = []
    for map_, inside in zip(chain, mask, strict=True):
        y, x = np.nonzero(inside)
        if len(x):
            left, right, top, bottom = x.min(), x.max(), y.min(), y.max()
            box = [[left, top], [right, top], [left, bottom], [right, bottom]]
            corners.append(np.array(box) @ map_[:, :2].T + map_[:, 2])
    corners = np.concatenate(corners)
    reach = 2 * np.array(mask.shape[:0:-1])
    low, high = corners.min(0) - 0.5 - margin, corners.max(0) + 0.5 + margin
    # A chain that runs away shall cost texels, not the memory of the machine.
    return np.maximum(low, -reach), np.minimum(high, reach + mask.shape[:0:-1])


def _normalised(chain, low, high, h: int, w: int) -> np.ndarray:
    """The maps with frame and atlas in [-1, 1] in place of pixels."""
    into = np.array([[w / 2, 0, (w - 1) / 2], [0, h / 2, (h - 1) / 2], [0, 0, 1]])
    scale = 2 / (high - low)
    out = np.array([[scale[0], 0, -scale[0] * low[0] - 1], [0, scale[1], -scale[1] * low[1] - 1]])
    whole = np.concatenate([chain, np.tile([[[0.0, 0.0, 1.0]]], (len(chain), 1, 1))], 1)
    return out @ whole @ into


def _soft(mask: Tensor) -> Tensor:
    """Logits of an opacity from a mask: 0.98 inside, 0.02 outside, between them at its edge."""
    near = F.avg_pool2d(mask[:, None].float(), 3, 1, 1, count_include_pad=False)[:, 0]
    return 8 * near - 4


def filled(picture: Tensor, cover: Tensor) -> Tensor:
    """Texels that no pixel shows get the colour of those around, by ever coarser means.

    Args:
        picture: [H, W, 3].
        cover: [H, W], 0 where nothing is known.
    """
    h, w = cover.shape
    if cover.min() > 0 or min(h, w) == 1:
        return picture
    color, weight = picture.permute(2, 0, 1)[None], cover[None, None].clamp(max=1)
    small = F.avg_pool2d(weight, 2, ceil_mode=True)
    mean = F.avg_pool2d(color * weight, 2, ceil_mode=True) / small.clamp(min=1e-8)
    mean = torch.where(small > 0, mean, 0)
    below = filled(mean[0].permute(1, 2, 0), small[0, 0]).permute(2, 0, 1)[None]
    below = F.interpolate(below, (h, w), mode="bilinear")
    return torch.where(weight > 0, color, below)[0].permute(1, 2, 0)


@torch.no_grad()
def _clear(model: LayeredAtlas) -> None:
    """Colours in [0, 1], and none that nearly nobody has seen, which Adam drives anywhere."""
    left = torch.ones_like(model.logits[0]).flatten(1)
    for i, layer in enumerate(model.layers):
        visible = left
        if i < len(model.logits):
            visible = left * model.alphas()[i].flatten(1)
            left = left - visible
        uv, weight = model.uv_maps(i).reshape(1, -1, 2), visible.reshape(1, -1)
        _, cover = atlas_splat(weight[..., None], uv, layer.size, weight=weight)
        seen = torch.where(cover[0] < LEAST_COVER, 0, cover[0])
        layer.colors.copy_(filled(layer.colors.clamp(0, 1), seen))


class _Trainer:
    def __init__(self, model, settings, pixels, masks, flow, generator):
        self.model, self.settings, self.generator = model, settings, generator
        self.pixels, self.masks, self.grid = pixels, masks, model.grid()
        frames, h, w = model.shape
        self.size = torch.tensor([w, h], device=pixels.device)
        self.forward = torch.from_numpy(flow.forward).flatten(1, 2).to(pixels) * 2 / self.size
        self.trusted = torch.from_numpy(flow.trusted).flatten(1, 2).to(pixels)
        self.count = min(math.ceil(settings.points / frames), h * w)
        # A displacement in UV, in pixels of the clip: what the terms on it are measured in.
        self.scale = [
            torch.tensor([x.size[1], x.size[0]], device=pixels.device) / (2 * settings.texels)
            for x in model.layers
        ]
        self.optimizer = torch.optim.Adam(
            [
                {"params": [x.affine for x in model.layers], "lr": settings.affine},
                {"params": [p for x in model.layers for p in x.bends], "lr": settings.bend},
                {"params": [x.colors for x in model.layers], "lr": settings.colors},
                {"params": list(model.logits), "lr": settings.opacity},
            ]
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda i: 0.55 + 0.45 * math.cos(math.pi * min(1, i / max(1, settings.steps))),
        )

    def step(self, number: int) -> float:
        model, s = self.model, self.settings
        frames, h, w = model.shape
        draw = torch.randint(h * w, (frames, self.count), generator=self.generator)
        draw = draw.to(self.pixels.device)
        points = self.grid[draw]
        uv = [layer.uv(points) for layer in model.layers]
        alpha = [model.opacity(i, points) for i in range(len(model.logits))]
        colors = [
            atlas_sample(layer.colors[None], x.reshape(1, -1, 2)).reshape(frames, -1, 3)
            for layer, x in zip(model.layers, uv, strict=True)
        ]
        shown = atlas_composite(torch.stack(colors, 1), torch.stack(alpha, 1))
        wanted = self.pixels.gather(1, draw[..., None].expand(-1, -1, 3))
        loss = F.mse_loss(shown, wanted)
        loss = loss + s.rigidity * sum(self._rigidity(i) for i in range(len(model.layers)))
        for a, c in zip(alpha, colors, strict=False):
            loss = loss + s.sparsity * ((1 - a)[..., None] * c.abs()).mean()
        if number < s.steps // 2:
            for i, a in enumerate(alpha):
                truth = self.masks[i].gather(1, draw)
                loss = loss + s.mask * F.binary_cross_entropy(a, truth)
        if frames > 1:
            loss = loss + self._flow(draw, points, uv, alpha)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    def _flow(self, draw, points, uv, alpha) -> Tensor:
        """A pixel and where it goes are one place of the atlas, and equally opaque."""
        draw, frames = draw[:-1], slice(1, None)
        there = points[:-1] + self.forward.gather(1, draw[..., None].expand(-1, -1, 2))
        trusted, total = self.trusted.gather(1, draw), 0
        left = torch.ones_like(trusted)
        for i, layer in enumerate(self.model.layers):
            visible = left
            if i < len(alpha):
                a = alpha[i][:-1]
                visible = left * a.detach()
                left = left * (1 - a.detach())
                step = (a - self.model.opacity(i, there, frames)).abs()
                total = total + self.settings.opacity_flow * (trusted * step).mean()
            away = (layer.uv(there, frames) - uv[i][:-1]) * self.scale[i]
            away = (away.square().sum(-1) + 1e-6).sqrt()
            total = total + self.settings.flow_weight * (trusted * visible * away).mean()
        return total

    def _rigidity(self, i: int) -> Tensor:
        """|J^T J| + |(J^T J)^-1| of the mapping on its finest nodes, least where it is rigid."""
        layer = self.model.layers[i]
        frames, n = self.model.shape[0], layer.bends[-1].shape[1]
        axis = ((2 * torch.arange(n, device=self.grid.device) + 1) / n - 1) * (1 - 1 / n)
        nodes = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(1, -1, 2)
        nodes = nodes.expand(frames, -1, -1)
        step = 2 / n
        start = layer.uv(nodes)
        columns = []
        for k in range(2):
            offset = torch.zeros(2, device=nodes.device)
            offset[k] = step
            # In pixels of the clip on both sides, so that no motion at all is the identity.
            moved = (layer.uv(nodes + offset) - start) * self.scale[i]
            columns.append(moved / (step * self.size[k] / 2))
        a = columns[0].square().sum(-1)
        b = (columns[0] * columns[1]).sum(-1)
        c = columns[1].square().sum(-1)
        size = (a.square() + 2 * b.square() + c.square()).clamp(min=1e-12).sqrt()
        return (size + size / (a * c - b.square()).clamp(min=1e-3)).mean()
