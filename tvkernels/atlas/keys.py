"""From edited key frames to an edited atlas: which frames, and how their edits become one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvkernels import atlas_sample, atlas_splat


def key_frames(
    uv: Tensor, alpha: Tensor, size: tuple[int, int], every: int, overlap: float
) -> list[int]:
    """Which frames a layer is edited in (section 3.2 and supplement A).

    Args:
        uv, alpha: [F, P, 2] and [F, P] of the layer.
        size: of its atlas.
        every: frames from one to the next; three at least, of a clip that has them.
        overlap: share of the texels of one that the one before shows, where frames between allow.
    Returns:
        Their numbers, in order.
    """
    frames = len(uv)
    count = min(frames, max(3, -(-(frames - 1) // every) + 1))
    keys = sorted({round(i * (frames - 1) / max(1, count - 1)) for i in range(count)})
    ones = torch.ones_like(alpha)[..., None]

    def shows(f: int) -> Tensor:
        _, cover = atlas_splat(ones[f : f + 1], uv[f : f + 1], size, weight=alpha[f : f + 1])
        return cover[0] > 0.5

    place = 1
    while place < len(keys):
        before, own = keys[place - 1], keys[place]
        texels = shows(own)
        shared = (texels & shows(before)).sum() / texels.sum().clamp(min=1)
        if shared < overlap and own - before > 1:
            keys.insert(place, (before + own) // 2)
        else:
            place += 1
    return keys


def texels_seen(cover: Tensor, uv: Tensor, alpha: Tensor, shape: tuple[int, int]) -> Tensor:
    """Where the atlas shows a frame, and between its pixels: an object that is small in this frame
    and large in the atlas leaves texels without any.

    Args:
        cover: [H, W] of the frame's splat, whose pixels reach two texels each way.
        uv, alpha: [P, 2] and [P] of the frame.
        shape: (height, width) of the frame.
    Returns:
        bool [H, W].
    """
    place = (uv * uv.new_tensor(cover.shape[::-1]) / 2).unflatten(0, shape)
    solid, apart = alpha.view(shape) > 0.5, 2.0
    for axis, count in enumerate(shape):
        both = solid.narrow(axis, 1, count - 1) & solid.narrow(axis, 0, count - 1)
        steps = place.diff(dim=axis).abs().amax(2)[both]
        apart = max(apart, steps.max().item()) if len(steps) else apart
    radius = math.ceil((math.ceil(apart) - 2) / 2)
    seen, side = (cover > 0).to(uv)[None], 2 * radius + 1
    grown = F.max_pool2d(seen, side, 1, radius)
    return -F.max_pool2d(-grown, side, 1, radius)[0] > 0


def median(partial: Sequence[Tensor], covers: Sequence[Tensor]) -> Tensor:
    """Median [H, W, 3] of the partial atlases that show a texel, 0 where none does."""
    seen = torch.stack(list(covers))[..., None] > 0
    values = torch.where(seen, torch.stack(list(partial)), float("nan"))
    return values.nanmedian(0).values.nan_to_num(0)


def aggregate(
    start: Tensor, partial: Sequence[Tensor], targets: Tensor, uv: Tensor, alpha: Tensor,
    steps: int = 500, rate: float = 0.003,
) -> Tensor:  # fmt: skip
    """The aggregation network: two convolutions and a skip, trained on the key frames (eq. 7).

    Args:
        start: [H, W, 3], what the skip carries.
        partial: N partial atlases [H, W, 3].
        targets: [N, P, 3] edited key frames.
        uv, alpha: [N, P, 2] and [N, P], the layer's in those frames; the loss counts its pixels.
        steps, rate: of SGD with momentum 0.9 (supplement A).
    Returns:
        The aggregated atlas [H, W, 3].
    """
    stack = torch.cat(list(partial), 2).permute(2, 0, 1)[None]
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # the same edit, the same network
        network = nn.Sequential(
            nn.Conv2d(stack.shape[1], 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1)
        ).to(start.device)
        nn.init.zeros_(network[2].weight)
        nn.init.zeros_(network[2].bias)
        optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
        own = alpha > 0.01
        points, wanted, weight = uv[own][None], targets[own], alpha[own][:, None]
        for _ in range(steps):
            colors = start + network(stack)[0].permute(1, 2, 0)
            shown = atlas_sample(colors[None], points)[0]
            loss = (weight * (shown - wanted).abs()).sum() / weight.sum().clamp(min=1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return (start + network(stack)[0].permute(1, 2, 0)).detach().clamp(0, 1)
