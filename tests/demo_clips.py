"""A clip of the shapes world as files."""

import numpy as np

from tvkernels.video import write_video


def write_with_mask(clip, folder) -> None:
    """Writes the folders `clip` and `mask` of pictures, where its one object is white."""
    write_video(folder / "clip", clip.frames, 8)
    masks = np.repeat((clip.masks > 0.5)[..., None] * np.uint8(255), 3, -1)
    write_video(folder / "mask", masks, 8)
