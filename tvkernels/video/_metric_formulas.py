"""The metrics' formulas: features, embeddings or flows in, one number out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize


def consecutive_cosine(features: Tensor, least: float = -1.0) -> float:
    """Mean cosine between each frame's features and the next one's.

    Args:
        features: [F, C], two frames at least.
        least: what a lower cosine counts as; V2VBench counts negative ones as 0.
    """
    return cosine_similarity(features[1:], features[:-1], dim=-1).clamp(min=least).mean().item()


def pairwise_cosine(features: Tensor) -> float:
    """Mean cosine over all pairs of different frames; features [F, C], two frames at least."""
    units = normalize(features.double(), dim=-1)
    frames = len(units)
    # |sum of units|² counts every pair twice, and each frame with itself.
    return ((units.sum(0).square().sum() - frames) / (frames * (frames - 1))).item()


def text_cosine(images: Tensor, text: Tensor) -> float:
    """Mean cosine of frames' embeddings [F, C] with a prompt's [C]."""
    return cosine_similarity(images, text[None], dim=-1).mean().item()


def frame_wise_accuracy(images: Tensor, target: Tensor, source: Tensor) -> float:
    """Share of frames [F, C] that are nearer to the target's prompt [C] than to the source's."""
    near, far = (cosine_similarity(images, text[None], dim=-1) for text in (target, source))
    return (near > far).double().mean().item()


def end_point_error(flow: Tensor, other: Tensor) -> float:
    """Mean distance between where two flows lead, in their unit; both [..., 2]."""
    return (flow - other).square().sum(-1).sqrt().mean().item()


def dover_score(technical: float, aesthetic: float) -> float:
    """DOVER's two grades in one of 0 to 1, by the statistics and weights it is published with."""
    fused = 0.6104 * (technical - 0.1107) / 0.07355 + 0.3896 * (aesthetic + 0.08285) / 0.03774
    return torch.tensor(fused, dtype=torch.float64).sigmoid().item()
