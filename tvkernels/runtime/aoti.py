"""AOTInductor: the UNet as compiled code in one file, loaded without compiling.

Where tvkernels runs it, the code is of a structure, not of weights: a package made once serves
every tuned clip, whose weights it takes when loaded. Its name is a hash of all that the code
depends on. What is written for other programs holds its weights too.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tvkernels._inflate import InflatedHandle
from tvkernels.runtime import files
from tvkernels.runtime.compile import why_not as why_not_inductor
from tvkernels.runtime.files import ArtifactError, artifact_key, artifacts, new_file
from tvkernels.runtime.program import INPUTS, OUTPUT, Shape, VideoStep, export_program
from tvkernels.runtime.settings import FLOATS, compile_settings

OPTIONS = ("folder",)
LIVE = False
DTYPES = FLOATS

CODE_ALONE = {
    # Stable Diffusion's weights would make a package of 3.4 GB, and of one clip.
    "aot_inductor.package_constants_in_so": False,
    # Else numbers, such as a spectral norm, are written into the code, out of reach.
    "always_keep_tensor_constants": True,
}
WHOLE: dict = {}


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
    how = dict(compile_settings(handle.model.device.type).inductor)
    return artifacts(folder) / f"unet-{artifact_key(handle, shape, f'aoti {how}')}.pt2"


def build(handle: InflatedHandle, shape: Shape, path: Path, how: dict = CODE_ALONE) -> Path:
    """Compiles the UNet for one shape; minutes on a small machine.

    Args:
        how: Inductor's settings, `CODE_ALONE` or `WHOLE`.
    Raises:
        ArtifactError: the package cannot be written.
    """
    own = compile_settings(handle.model.device.type).inductor
    with new_file(path) as part, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, about its own parts
        program = export_program(handle, shape, dynamic_clips=False, keep_ops=True)
        # Inductor insists on the suffix.
        made = part.with_suffix(".pt2")
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(made), inductor_configs={**own, **how}
        )
        os.replace(made, part)
    return path


def write_into(
    place: Path, handle: InflatedHandle, shape: Shape, *, clips: Sequence[int],
    say: Callable[[str], None],
) -> list[Path]:  # fmt: skip
    """Whole packages for `torch._inductor.aoti_load_package`, one for each number of clips.

    Our ops are nodes of their own in them: a program that loads one imports tvkernels first.

    Args:
        place: a folder that is there, whose caller sees to it that it is whole.
        handle: of the inflated UNet, on the device and in the dtype of the package.
        shape: of one call.
        clips: numbers of clips in a call, each a package.
        say: shows one line to the user.
    Returns:
        model.<clips>.pt2 each, with metadata.json beside them.
    Raises:
        ArtifactError: a package cannot be written.
    """
    written = []
    for count in clips:
        say(f"compiling for {count} x {shape.frames} frames")
        path = build(handle, replace(shape, clips=count), place / f"model.{count}.pt2", WHOLE)
        say(f"{path.name}: {path.stat().st_size} bytes")
        written.append(path)
    handle.model.save_config(place)
    about = files.describe(
        handle, shape, "aoti", clips=[*clips], dynamic_size=False, inputs=list(INPUTS),
        output=OUTPUT, device=handle.model.device.type,
        multiple=2 ** (len(handle.model.config.block_out_channels) - 1),
    )  # fmt: skip
    files.write(place / files.METADATA, about, [*written, place / "config.json"])
    return written


def load_whole(folder: Path) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What `write_into` wrote as a step (sample, timestep, text) -> noise.

    Raises:
        ArtifactError: damaged, of another version of torch or for another device.
    """
    about = files.read(Path(folder) / files.METADATA, "aoti")
    made = about["versions"]["torch"]
    if made != torch.__version__:
        raise ArtifactError(
            f"{folder} was compiled by torch {made}, here is {torch.__version__}: export again"
        )
    if about["device"] == "cuda" and not torch.cuda.is_available():
        raise ArtifactError(f"{folder} is compiled for CUDA, and torch sees no GPU")
    steps = {n: _open(Path(folder) / f"model.{n}.pt2") for n in about["clips"]}

    def run(sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        clips = files.check_call(about, sample, timestep, text)
        if clips not in steps:
            known = ", ".join(map(str, steps))
            raise ValueError(f"this export takes {known} clips in a call, got {clips}")
        return steps[clips](sample.contiguous(), timestep.contiguous(), text.contiguous())

    return run


def load(path: Path, handle: InflatedHandle, shape: Shape):
    """A step (sample, timestep, text) -> noise with the UNet's weights of now.

    Raises:
        ArtifactError: the file is no package, or not one of this UNet.
    """
    compiled, frames = _open(path), shape.frames
    step = VideoStep(handle.model, frames, handle.tables(frames, handle.model.device))
    own = {**dict(step.named_parameters()), **dict(step.named_buffers())}
    wanted = compiled.get_constant_fqns()
    strange = [name for name in wanted if name not in own]
    if strange:
        raise ArtifactError(f"{path} is of another UNet: it wants {strange[0]}")
    weights = {name: own[name].detach() for name in wanted}
    compiled.load_constants(weights, check_full_update=True, user_managed=True)

    def run(sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return compiled(sample.contiguous(), timestep.contiguous(), text.contiguous())

    run.weights = weights  # alive as long as the code that reads them
    return run


def _open(path: Path):
    try:
        return torch._inductor.aoti_load_package(str(path))
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"{path} cannot be loaded ({reason}): delete it") from error
