"""What an atlas costs and gives back.

`python -m tvkernels.benchmarks.edits.atlas [CLIP FRAMES SIZE]`: without a clip, the first held-out
scenes of the shapes world, with their true masks. Rows go to results/atlas.jsonl.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from tvkernels.atlas import AtlasSettings, train_atlas
from tvkernels.atlas.train import psnr
from tvkernels.benchmarks import RESULTS, machine, stored
from tvkernels.demo.world import edit_pair
from tvkernels.video import read_video

ROWS = RESULTS / "atlas.jsonl"
SCENES = 3


def main(argv: list[str]) -> int:
    """Trains, prints a line for each clip and keeps its row."""
    if argv:
        clip, frames, size = argv
        video = read_video(clip, frames=int(frames), size=int(size), multiple=2)
        clips = {Path(clip).name: (video.frames, None)}
    else:
        scenes = [edit_pair(i)[0].render() for i in range(SCENES)]
        clips = {f"scene {i}": (x.frames, [x.masks > 0.5]) for i, x in enumerate(scenes)}
    for name, (frames, masks) in clips.items():
        row = measure(name, frames, masks)
        print(row, flush=True)
        stored.append(ROWS, row)
    return 0


def measure(name: str, frames, masks) -> dict:
    """A clip's row: seconds of the whole training, its steps, and the reconstruction in dB."""
    settings, began = AtlasSettings().of(*frames.shape[:3]), time.perf_counter()
    draw = torch.Generator().manual_seed(0)
    model = train_atlas(frames, masks, settings, generator=draw)
    seconds = time.perf_counter() - began
    facts = {"clip": name, "shape": [*frames.shape[:3]], "masks": masks is not None}
    facts |= {"steps": settings.steps, "points": settings.points, "seconds": round(seconds, 1)}
    facts |= {"psnr": round(psnr(model, frames), 2)}
    return facts | machine.facts(torch.device("cpu")) | {"date": machine.today()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
