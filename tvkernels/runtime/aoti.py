"""AOTInductor: the UNet as compiled code in one file, loaded without compiling.

The code is of a structure, not of weights: a package made once serves every tuned clip, whose
weights it takes when loaded. Its name is a hash of all that the code depends on.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from tvkernels.inflate import InflatedHandle
from tvkernels.runtime.compile import why_not as why_not_inductor
from tvkernels.runtime.files import artifact_key, artifacts, new_file
from tvkernels.runtime.program import Shape, VideoStep, export_program

OPTIONS = ("folder",)
LIVE = False

CODE_ALONE = {
    # Stable Diffusion's weights would make a package of 3.4 GB, and of one clip.
    "aot_inductor.package_constants_in_so": False,
    # Else numbers, such as a spectral norm, are written into the code, out of reach.
    "always_keep_tensor_constants": True,
}


def serves(shape: Shape) -> object:
    """This shape alone: fixed sizes give faster code, sooner."""
    return shape


def why_not(device: str) -> list[str]:
    """What Inductor needs, compiled beforehand or not."""
    return why_not_inductor(device)


def prepare(handle: InflatedHandle, shape: Shape, folder: str | Path | None = None):
    """A step from the package for this structure, which is made where it is missing.

    Args:
        folder: where packages lie; by default with the other caches.
    """
    path = package_path(handle, shape, folder)
    if not path.exists():
        build(handle, shape, path)
    return load(path, handle, shape)


def package_path(handle: InflatedHandle, shape: Shape, folder: str | Path | None = None) -> Path:
    """Where the package for this structure and shape lies, made or not."""
    return artifacts(folder) / f"unet-{artifact_key(handle, shape, 'aoti')}.pt2"


def build(handle: InflatedHandle, shape: Shape, path: Path) -> Path:
    """Compiles the UNet for one shape; minutes on a small machine.

    Raises:
        ArtifactError: the package cannot be written.
    """
    program = export_program(handle, shape, dynamic_clips=False, keep_ops=True)
    with new_file(path) as part:
        # Inductor insists on the suffix.
        made = part.with_suffix(".pt2")
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(made), inductor_configs=CODE_ALONE
        )
        os.replace(made, part)
    return path


def load(path: Path, handle: InflatedHandle, shape: Shape):
    """A step (sample, timestep, text) -> noise with the UNet's weights of now.

    Raises:
        ValueError: the file is no package, or not one of this UNet.
    """
    try:
        compiled = torch._inductor.aoti_load_package(str(path))
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be loaded ({reason}): delete it") from error
    frames = shape.frames
    step = VideoStep(handle.model, frames, handle.tables(frames, handle.model.device))
    own = {**dict(step.named_parameters()), **dict(step.named_buffers())}
    wanted = compiled.get_constant_fqns()
    strange = [name for name in wanted if name not in own]
    if strange:
        raise ValueError(f"{path} is of another UNet: it wants {strange[0]}")
    weights = {name: own[name].detach() for name in wanted}
    compiled.load_constants(weights, check_full_update=True, user_managed=True)

    def run(sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return compiled(sample.contiguous(), timestep.contiguous(), text.contiguous())

    run.weights = weights  # alive as long as the code that reads them
    return run
