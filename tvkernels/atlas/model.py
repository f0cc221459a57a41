"""The layered atlas: mappings, opacities and colours on multiresolution grids.

A network of 8 layers of 256 asks 0.5 MFLOP for each pixel of each of its calls, and there are a
dozen in a step; a grid asks a bilinear lookup. What the original learns by them in 300,000 steps
starts here from optical flow, as an affine map for each frame, which the grids then bend.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tvkernels import atlas_composite, atlas_sample

# Nodes of the grids that bend a frame's affine map, from coarse to fine.
BENDS = (4, 16)


class Layer(nn.Module):
    """One layer: mapping [F pixels -> atlas] and colours.

    Args:
        affine: [F, 2, 3], (x, y, 1) of a frame -> (u, v), all in [-1, 1].
        size: (height, width) of the atlas in texels.
        bends: nodes on a side of each grid of the mapping.
    """

    def __init__(self, affine: Tensor, size: tuple[int, int], bends: tuple[int, ...] = BENDS):
        super().__init__()
        self.affine = nn.Parameter(affine.float().clone())
        self.bends = nn.ParameterList(torch.zeros(len(affine), n, n, 2) for n in bends)
        self.colors = nn.Parameter(torch.zeros(*size, 3))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the atlas in texels."""
        return tuple(self.colors.shape[:2])

    def uv(self, points: Tensor, frames=slice(None)) -> Tensor:
        """[f, P, 2] positions in frames, in [-1, 1] -> UV (eq. 1)."""
        affine = self.affine[frames]
        uv = points @ affine[..., :2].transpose(1, 2) + affine[..., 2][:, None]
        for grid in self.bends:
            uv = uv + atlas_sample(grid[frames], points)
        return uv


class LayeredAtlas(nn.Module):
    """Foreground layers from the front, then the background.

    Args:
        affines: [F, 2, 3] for each layer, the background's last.
        sizes: (height, width) of each atlas.
        opacity: logits [F, H, W] of each foreground in each pixel.

    Attributes:
        layers: the `Layer`s.
        logits: of the foregrounds' opacity.
    """

    def __init__(self, affines, sizes, opacity, bends: tuple[int, ...] = BENDS):
        super().__init__()
        self.layers = nn.ModuleList(
            Layer(a, size, bends) for a, size in zip(affines, sizes, strict=True)
        )
        self.logits = nn.ParameterList(x.float().clone() for x in opacity)
        self.shape = tuple(opacity[0].shape)

    @property
    def names(self) -> list[str]:
        """ "foreground" (numbered where there are several), ..., "background"."""
        count = len(self.logits)
        own = ["foreground"] if count == 1 else [f"foreground-{i + 1}" for i in range(count)]
        return [*own, "background"]

    def opacity(self, layer: int, points: Tensor, frames=slice(None)) -> Tensor:
        """[f, P, 2] positions in frames -> opacity [f, P] of a foreground in (0, 1)."""
        return atlas_sample(self.logits[layer][frames][..., None], points)[..., 0].sigmoid()

    def grid(self) -> Tensor:
        """Centres of a frame's pixels, [H * W, 2] in [-1, 1]."""
        _, h, w = self.shape
        axes = [(2 * torch.arange(n, device=self.device) + 1) / n - 1 for n in (w, h)]
        return torch.stack(torch.meshgrid(*axes, indexing="xy"), -1).reshape(-1, 2)

    @property
    def device(self) -> torch.device:
        return self.logits[0].device

    @torch.no_grad()
    def uv_maps(self, layer: int) -> Tensor:
        """UV of every pixel, [F, H * W, 2]."""
        points = self.grid()[None]
        return torch.cat([self.layers[layer].uv(points, [f]) for f in range(self.shape[0])])

    @torch.no_grad()
    def alphas(self) -> Tensor:
        """Opacity of the foregrounds in every pixel, [L - 1, F, H, W]."""
        return torch.stack([x.sigmoid() for x in self.logits])

    @torch.no_grad()
    def render(self, atlases: dict[int, Tensor] | None = None) -> Tensor:
        """The clip (eq. 2 and 3).

        Args:
            atlases: edited pictures [H, W, 3], or [H, W, 4] whose last channel says how much of
                the layer is left, by layer; the others show themselves.
        Returns:
            [F, 3, H, W] in [0, 1].
        """
        given = atlases or {}
        frames, h, w = self.shape
        pictures = [given.get(i, layer.colors) for i, layer in enumerate(self.layers)]
        alphas, points, shown = self.alphas().flatten(2), self.grid()[None], []
        for f in range(frames):
            colors, alpha = [], alphas[:, f]
            for i, picture in enumerate(pictures):
                color = atlas_sample(picture[None], self.layers[i].uv(points, [f]))
                if color.shape[2] == 4:
                    alpha = alpha.clone()
                    alpha[i] *= color[0, :, 3]
                colors.append(color[..., :3])
            shown.append(atlas_composite(torch.stack(colors, 1), alpha[None]))
        return torch.cat(shown).transpose(1, 2).unflatten(2, (h, w)).clamp_(0, 1)
