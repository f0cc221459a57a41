"""What StableVideo takes from files: ControlNets, a depth estimator, masks, a finished atlas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from tvkernels.pipelines.checks import ModelError

if TYPE_CHECKING:
    import numpy as np

METRIC = ("depth_pro", "glpn", "zoedepth")  # of transformers: far is large


def load_guides(
    canny: str | None = None, depth: str | None = None, estimator: str | None = None
) -> dict:
    """What `StableVideoPipeline` takes under these names; those that are not asked for are absent.

    Args:
        canny, depth: diffusers' `ControlNetModel` for SD-1.x, a folder or a hub name.
        estimator: a depth model of transformers, such as MiDaS (DPT), with the image processor
            that it was trained behind; needed with `depth`.
    Raises:
        ModelError: one cannot be loaded, depth comes without its estimator, or that gives meters.
    """
    if (depth is None) != (estimator is None):
        raise ModelError("a depth ControlNet and a depth model go together: give both or neither")
    found = {}
    for name, folder in (("controlnet_canny", canny), ("controlnet_depth", depth)):
        if folder is not None:
            from diffusers import ControlNetModel

            found[name] = _load(ControlNetModel, folder).eval()
    if estimator is not None:
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        found["depth_processor"] = _load(AutoImageProcessor, estimator)
        model = found["depth_estimator"] = _load(AutoModelForDepthEstimation, estimator).eval()
        config = model.config
        if config.model_type in METRIC or "metric" in getattr(config, "depth_estimation_type", ""):
            raise ModelError(
                f"{estimator} gives distances, the depth ControlNet wants relative depth: give a "
                "model such as MiDaS (DPT)"
            )
    return found


@contextmanager
def hint_made(net: nn.Module) -> Iterator[None]:
    """Inside, a ControlNet takes its condition's features in place of the condition.

    They are the same in every step: 14.7 GFLOP a picture of 512 x 512, of the 284 that the whole
    net takes.

    Args:
        net: diffusers' `ControlNetModel`; `net.controlnet_cond_embedding(condition)` makes them.
    """
    embedding, net.controlnet_cond_embedding = net.controlnet_cond_embedding, nn.Identity()
    try:
        yield
    finally:
        net.controlnet_cond_embedding = embedding


def prepared(frames: np.ndarray, mask: np.ndarray | None, folder: Path | None) -> dict:
    """What `StableVideoPipeline.fit` takes beside the clip, from a mask or a folder of an atlas.

    Args:
        frames: uint8 [F, H, W, 3].
        mask: bool [F, H, W], of `read_mask`.
        folder: that `tvk atlas` wrote.
    Raises:
        VideoError: no atlas, or one of other frames.
    """
    if folder is not None:
        from tvkernels.atlas.files import AtlasError, digest, load_atlas

        atlas, info = load_atlas(folder)
        if info["frames"] != digest(frames):
            raise AtlasError(f"the atlas in {folder} is of other frames than these")
        return {"atlas": atlas}
    return {} if mask is None else {"masks": [mask]}


def _load(kind, folder: str):
    from safetensors import SafetensorError

    try:
        return kind.from_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"cannot load {kind.__name__} from {folder}: {reason}") from error
