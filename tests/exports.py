"""Exports of tiny UNets, each made once for all test files and workers."""

import copy
import os
from pathlib import Path

import torch
from filelock import FileLock
from fresh import printed
from tiny_unets import one_level_unet, seeded

import tvkernels
from tvkernels.recipes import RECIPES
from tvkernels.runtime.program import VideoStep, shape_of

# Recipe -> (dtype, opset): each of both at least once.
KINDS = {
    "ei2": (torch.float32, 23),
    "tune-a-video": (torch.float32, 18),
    "frame-by-frame": (torch.float16, 23),
    "tcve": (torch.float32, 23),
}
FRAMES, TOKENS = 3, 5
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
sys.path.insert(0, sys.argv[1])
import exports
exports.write(sys.argv[2], sys.argv[3])
"""


def inflated(recipe: str):
    """The handle of a one-level UNet with random weights, always the same, in its file's dtype."""
    unet = one_level_unet()
    handle = tvkernels.inflate(unet, RECIPES[recipe], generator=seeded())
    unet.to(KINDS[recipe][0])
    return handle


def shape(handle):
    """Of a call of 8 x 8 latents."""
    return shape_of(handle, FRAMES, (8, 8), TOKENS)


def write(recipe: str, folder: str) -> None:
    """Exports to `folder`."""
    from tvkernels.runtime import onnx

    handle = inflated(recipe)
    onnx.export(handle, shape(handle), Path(folder), opset=KINDS[recipe][1])


def exported(recipe: str, tmp_path_factory) -> Path:
    """The ONNX file of a recipe; in a process that has no triton, for it is not needed."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / f"export-{recipe}"
    with FileLock(base / f"export-{recipe}.lock"):
        if not folder.exists():
            printed(WITHOUT_TRITON, Path(__file__).parent, recipe, folder)
    return folder / "unet" / "model.onnx"


def truth(handle, *inputs):
    """(in the handle's dtype, in float64): what eager PyTorch makes of flat inputs."""
    step = VideoStep(handle.model, shape(handle).frames)
    exact = VideoStep(copy.deepcopy(handle.model).double(), shape(handle).frames)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    with torch.no_grad():
        return step(*inputs), exact(*wide)
