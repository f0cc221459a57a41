"""What `tvk export` does: check, load, inflate, write, and compare with eager PyTorch."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from tvkernels.config import EMBEDDED, ConfigError
from tvkernels.demo import MODEL_DIR
from tvkernels.pipelines import METHODS
from tvkernels.pipelines.checks import ModelError, check_model, model_size

if TYPE_CHECKING:
    from torch import nn

    from tvkernels._inflate import InflatedHandle
    from tvkernels.runtime.program import Shape

FORMATS = ("onnx", "tensorrt", "aoti")
DTYPES = {"fp16": "float16", "fp32": "float32"}
TOKENS = 77  # of CLIP, which every Stable Diffusion 1.x model reads
REPEATS = 3


@dataclass(frozen=True)
class ExportSettings:
    """What an export is made from.

    Args:
        output: a folder; what is written lies in its unet/.
        method: a name of `tvkernels.pipelines.METHODS`.
        format: one of `FORMATS`.
        model: a Stable Diffusion 1.x directory, a hub name, or "embedded".
        frames: per clip; None takes the method's.
        size: pixels of the square picture; None takes the model's.
        dtype: one of `DTYPES`.
        opset: of ONNX.
        archs: of TensorRT, one engine each.
        weights: of the engine, see `runtime.tensorrt.build`.
        timing_cache: as there.
        dynamic_size: height and width may change.
        projected: text comes from `InflatedHandle.project_text`.
        plugins: attention as TensorRT plugins of our kernels; unproven.
    """

    output: Path
    method: str = "ei2"
    format: str = "onnx"
    model: str = EMBEDDED
    frames: int | None = None
    size: int | None = None
    dtype: str = "fp32"
    opset: int = 23
    archs: tuple[str, ...] = ()
    weights: str = "kept"
    timing_cache: Path | None = None
    dynamic_size: bool = True
    projected: bool = False
    plugins: bool = False


def export(given: ExportSettings, compare: bool, say: Callable[[str], None]) -> bool:
    """Writes an export, and where asked compares it with eager.

    Args:
        given: settings.
        compare: run what was written beside eager PyTorch, an ONNX file on several shapes.
        say: shows one line to the user.
    Returns:
        False where a comparison is beyond the error budget.
    Raises:
        ConfigError, ModelError: before any work of weight has begun, except where the disk fills
            up or a library refuses the model.
    """
    check(given)
    from tvkernels.runtime.files import ArtifactError, new_folder

    began = time.perf_counter()
    try:
        handle, exact, shape = load(given)
        with new_folder(given.output / "unet") as place:
            _write(given, handle, shape, place, say)
    except ArtifactError as error:
        raise ConfigError(str(error)) from error
    say(f"wrote {given.output / 'unet'} in {time.perf_counter() - began:.1f} s")
    if not compare:
        return True
    from tvkernels.runtime import aoti, onnx

    if given.format == "aoti":
        run, what = aoti.load_whole(given.output / "unet"), "AOTInductor"
        calls = [(count, shape) for count in clip_counts(given, handle)]
    else:
        run, what = onnx.load(given.output / "unet" / onnx.NAME), "ONNX Runtime"
        calls = others(handle, shape, given.dynamic_size)
    return all([_compare(run, what, handle, exact, other, clips, say) for clips, other in calls])


def check(given: ExportSettings) -> None:
    """What can be wrong without looking into the model.

    Raises:
        ConfigError, ModelError: one line that says what to do.
    """
    for name, value, known in (
        ("method", given.method, METHODS),
        ("format", given.format, FORMATS),
        ("dtype", given.dtype, DTYPES),
    ):
        if value not in known:
            raise ConfigError(f"unknown {name} {value!r}: use one of {', '.join(known)}")
    if given.format == "tensorrt" and not given.archs:
        raise ConfigError("--arch is missing: say which GPUs, such as --arch sm_89")
    if given.format != "tensorrt" and (given.archs or given.weights != "kept" or given.plugins):
        raise ConfigError("--arch, --weights and --plugins are for --format tensorrt")
    if given.format == "aoti" and (given.opset, given.dynamic_size) != (23, True):
        raise ConfigError("--opset and --fixed-size are of ONNX: a compiled package has one size")
    if given.frames is not None and given.frames < 1:
        raise ConfigError(f"a clip has one frame or more, not {given.frames}")
    if given.model != EMBEDDED:
        check_model(given.model)
    from tvkernels.runtime import aoti, files, onnx, tensorrt

    try:
        onnx.check_opset(given.opset)
        for arch in given.archs:
            tensorrt.check_arch(arch)
        files.check_new(given.output / "unet")
        if given.format == "tensorrt":
            tensorrt.library()
        if given.format == "aoti" and (reasons := aoti.why_not("cpu")):
            raise ConfigError("; ".join(reasons))
    except files.ArtifactError as error:
        raise ConfigError(str(error)) from error


def load(given: ExportSettings) -> tuple[InflatedHandle, nn.Module, Shape]:
    """The handle of the UNet to export, a more exact copy of it, and the shape of a call.

    Raises:
        ConfigError, ModelError: the model cannot be loaded, or the size does not fit it.
    """
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.utils import logging
    from safetensors import SafetensorError

    from tvkernels._inflate import inflate
    from tvkernels.demo.settings import method_numbers
    from tvkernels.devices import pick_device
    from tvkernels.runtime.program import shape_of

    model = MODEL_DIR if given.model == EMBEDDED else given.model
    pixels, multiple = model_size(model)
    pixels = pixels if given.size is None else given.size
    if pixels < multiple or pixels % multiple:
        raise ConfigError(f"size {pixels} must be a multiple of {multiple} pixels")
    numbers, _ = method_numbers(given.method, given.model == EMBEDDED)
    logging.set_verbosity_error()
    try:
        unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").eval()
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"cannot load the model {model}: {reason}") from error
    inflate(unet, numbers.recipe, generator=torch.Generator().manual_seed(0))
    dtype = getattr(torch, DTYPES[given.dtype])
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    # Compiled code is of the device it was compiled on.
    device = pick_device() if given.format == "aoti" else "cpu"
    exact = copy.deepcopy(unet).to(device, wide)
    handle = unet.to(device, dtype)._tvkernels_handle
    frames = numbers.frames if given.frames is None else given.frames
    side, halved = pixels // multiple, 2 ** (len(unet.config.block_out_channels) - 1)
    if side % halved:
        raise ConfigError(f"size {pixels} must be a multiple of {multiple * halved} pixels")
    shape = shape_of(handle, frames, (side, side), TOKENS, projected=given.projected)
    return handle, exact, shape


def _write(
    given: ExportSettings, handle: InflatedHandle, shape: Shape, place: Path, say
) -> None:  # fmt: skip
    from tvkernels.runtime import aoti, onnx, tensorrt

    counts = clip_counts(given, handle)
    if given.format == "aoti":
        aoti.write_into(place, handle, shape, clips=counts, say=say)
        return
    path = onnx.write_into(
        place, handle, shape, opset=given.opset, dynamic_size=given.dynamic_size, say=say,
        plugins=given.plugins,
    )  # fmt: skip
    for arch in given.archs:
        tensorrt.build(
            path, place / f"model.{arch}.engine", arch=arch, clips=(1, *counts),
            weights=given.weights, timing_cache=given.timing_cache, say=say,
        )  # fmt: skip


def clip_counts(given: ExportSettings, handle: InflatedHandle) -> tuple[int, int]:
    """Clips in a call of the inversion and in one under guidance, which doubles them.

    Where frames are clips of one, there are as many as are edited.
    """
    from tvkernels.demo.settings import method_numbers
    from tvkernels.runtime.program import mixes_frames

    clips = 1
    if not mixes_frames(handle):
        clips = given.frames or method_numbers(given.method, given.model == EMBEDDED)[0].frames
    return clips, 2 * clips


def others(handle: InflatedHandle, shape: Shape, dynamic_size: bool) -> list[tuple[int, Shape]]:
    """Numbers of clips and shapes that a comparison runs."""
    chosen = [(1, shape), (2, shape)]
    if dynamic_size:
        step = 2 ** (len(handle.model.config.block_out_channels) - 1)
        chosen.append((1, replace(shape, width=shape.width + step)))
    return chosen


def _compare(run, what: str, handle: InflatedHandle, exact, shape: Shape, clips: int, say) -> bool:
    import torch

    from tvkernels.runtime.program import VideoStep
    from tvkernels.testing.budget import error_and_budget

    given = shape.example(clips, handle.model.dtype, handle.model.device)
    eager = VideoStep(handle.model, shape.frames)
    with torch.no_grad():
        wide = [x.to(exact.dtype) if x.is_floating_point() else x for x in given]
        truth = VideoStep(exact, shape.frames)(*wide)
        (low, actual), seconds = _timed((lambda: eager(*given), lambda: run(*given)))
    error, budget = error_and_budget(actual, low, truth)
    verdict = "within" if error <= budget else "BEYOND"
    say(
        f"{clips} x {shape.frames} frames, latents {shape.height} x {shape.width}: error "
        f"{error:.2e}, {verdict} its budget of {budget:.2e}; "
        f"eager {seconds[0]:.3f} s, {what} {seconds[1]:.3f} s"
    )
    return error <= budget


def _timed(calls: Sequence[Callable]) -> tuple[list, list[float]]:
    """Results, and median seconds of interleaved calls after a first one."""
    results = [call() for call in calls]
    seconds = [[] for _ in calls]
    for _ in range(REPEATS):
        for kept, call in zip(seconds, calls, strict=True):
            began = time.perf_counter()
            call()
            kept.append(time.perf_counter() - began)
    return results, [median(kept) for kept in seconds]
