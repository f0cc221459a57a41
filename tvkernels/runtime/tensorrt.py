"""TensorRT engines from our ONNX files: built strongly typed, verified, run on torch's tensors.

Two libraries of one API: `tensorrt` 10 or 11, which times tactics on a GPU of the architecture it
builds for, and `tensorrt_rtx`, which also builds ahead of time without any. Attention is marked
decomposable, without which neither float32 nor head dims without a fused kernel build.
Nothing was ever run by an engine here: building is proven, execution is written to the API's text.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tvkernels._inflate import InflatedHandle
from tvkernels.runtime import files, onnx, plugins
from tvkernels.runtime._trt import aim, flags, library, logger, mark_decomposable, monitor, version
from tvkernels.runtime.files import ArtifactError
from tvkernels.runtime.program import INPUTS, Shape

if TYPE_CHECKING:
    from tvkernels.runtime._engine import Engine

OPTIONS = ("folder", "clips")
LIVE = False
DTYPES = (torch.float32, torch.float16)
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "sm_121")
WEIGHTS = ("kept", "refit", "stripped")

Range = tuple[int, int, int]


def serves(shape: Shape) -> object:
    """This shape alone, for as many clips as its profile holds."""
    return replace(shape, clips=0)


def why_not(handle: InflatedHandle | None = None) -> list[str]:
    """What running an engine here lacks."""
    reasons = onnx.why_not()
    try:
        library()
    except ArtifactError as error:
        reasons.append(str(error))
    if not torch.cuda.is_available():
        reasons.append("TensorRT runs on NVIDIA GPUs, and torch sees none")
    return reasons


def build(
    onnx_path: Path,
    target: Path,
    *,
    arch: str,
    clips: Range = (1, 1, 2),
    sizes: Sequence[tuple[int, int]] | None = None,
    weights: str = "kept",
    timing_cache: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """An engine for one architecture, with its metadata in `target`.json.

    Args:
        onnx_path: a file that `onnx.export` wrote.
        target: the engine's file.
        arch: one of `ARCHITECTURES`; `tensorrt` itself builds for the GPU that is here.
        clips: fewest, usual and most clips of a call.
        sizes: smallest, usual and largest (h, w) of the latents; None is the export's alone.
        weights: one of `WEIGHTS`: in the engine; exchangeable by `refit`; or left out and put back
            from the ONNX file on loading.
        timing_cache: a file read and written; for `tensorrt` alone, in RTX it has no effect.
        say: shows one line to the user.
    Returns:
        `target`.
    Raises:
        ArtifactError: unknown architecture, a damaged file, or what the builder refuses.
    """
    check_arch(arch)
    if weights not in WEIGHTS:
        raise ArtifactError(f"unknown weights {weights!r}: use one of {', '.join(WEIGHTS)}")
    about = files.read(Path(onnx_path).with_name(files.METADATA), "onnx")
    name, trt = library()
    if name == "tensorrt_rtx" and weights != "kept" and not torch.cuda.is_available():
        raise ArtifactError(f"tensorrt_rtx makes {weights} weights with a GPU only: keep them")
    if name == "tensorrt":
        check_device(arch)
    if about["plugins"]:
        _register_plugins(trt, name, arch)
    log = logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx_path)):
        errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise ArtifactError(f"TensorRT does not parse {onnx_path}: {errors}")
    marked = mark_decomposable(trt, network)
    say(f"{name} {version(name)}: {network.num_layers} layers, {marked} attentions; {arch}")
    config = builder.create_builder_config()
    ranges = profile_shapes(about, clips, sizes)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        if -1 in tensor.shape:
            profile.set_shape(tensor.name, *ranges[tensor.name])
    config.add_optimization_profile(profile)
    aim(trt, name, config, arch)
    for flag in {"refit": ["REFIT"], "stripped": ["STRIP_PLAN", "REFIT_IDENTICAL"]}.get(
        weights, []
    ):
        config.set_flag(getattr(trt.BuilderFlag, flag))
    progress = monitor(trt, say)  # must outlive the build
    config.progress_monitor = progress
    cache = _read_timing(config, name, timing_cache)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ArtifactError(
            f"TensorRT builds no engine for {arch}: {log.last or 'it gives no reason'}"
        )
    with files.new_file(target) as temporary:
        temporary.write_bytes(memoryview(engine))
    if cache is not None:
        with files.new_file(timing_cache) as temporary:
            temporary.write_bytes(memoryview(config.get_timing_cache().serialize()))
    more = {
        "kind": "tensorrt", "library": name, "library_version": version(name), "arch": arch,
        "layers": network.num_layers, "weights": weights, "profile": ranges,
        "onnx": Path(onnx_path).name,
    }  # fmt: skip
    files.write(target.with_suffix(".json"), {**about, **more}, [target])
    say(f"{target.name}: {target.stat().st_size} bytes")
    return target


def _register_plugins(trt, name: str, arch: str) -> None:
    if name != "tensorrt":
        raise ArtifactError("tensorrt_rtx has no plugins: export without them")
    try:
        importlib.import_module("tensorrt.plugin")
    except ImportError as error:
        raise ArtifactError(f"this TensorRT has no Python plugins ({error})") from None
    plugins.register(trt.plugin, arch)


def check_arch(arch: str) -> None:
    """Raises ArtifactError for an architecture that no engine can be built for."""
    if arch not in ARCHITECTURES:
        raise ArtifactError(
            f"unknown architecture {arch!r}: use one of {', '.join(ARCHITECTURES)}"
        )


def check_device(arch: str, device=None) -> None:
    """Raises ArtifactError where the GPU that is here is not of this architecture."""
    if not torch.cuda.is_available():
        raise ArtifactError(f"an engine for {arch} needs such a GPU here, and torch sees none")
    here = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    if here != arch:
        raise ArtifactError(f"an engine for {arch} does not run on this {here}: build one for it")


def profile_shapes(about: dict[str, Any], clips: Range, sizes) -> dict[str, list[list[int]]]:
    """Input -> its smallest, usual and largest shape.

    Raises:
        ArtifactError: the ranges do not grow, or the export has one size alone.
    """
    shape = about["shape"]
    own = (shape["height"], shape["width"])
    sizes = tuple(tuple(size) for size in sizes or (own,) * 3)
    grows = all(a <= b for a, b in pairwise(clips)) and all(
        x <= y for a, b in pairwise(sizes) for x, y in zip(a, b, strict=True)
    )
    if len(clips) != 3 or len(sizes) != 3 or clips[0] < 1 or not grows:
        raise ArtifactError(
            f"clips {clips} and sizes {sizes} must be a smallest, a usual and a largest"
        )
    if not about["dynamic_size"] and set(sizes) != {own}:
        raise ArtifactError(f"this export has the size {own[0]} x {own[1]} alone, not {sizes}")
    if any(n % about["multiple"] for size in sizes for n in size):
        raise ArtifactError(f"latents are multiples of {about['multiple']}, not {sizes}")
    frames, channels = shape["frames"], shape["channels"]
    samples = [[n * frames, channels, *size] for n, size in zip(clips, sizes, strict=True)]
    return {INPUTS[0]: samples, INPUTS[2]: [[n, *shape["text"]] for n in clips]}


def _read_timing(config, name: str, path: Path | None):
    if path is None or name == "tensorrt_rtx":
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def prepare(handle: InflatedHandle, shape: Shape, folder: Path, clips: Range = (1, 1, 2)):
    """A step for `accelerate`: the engine in `folder`, built where it is not there."""
    folder = Path(folder)
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(handle.model.device))
    target = engine_path(folder, arch)
    if not target.exists():
        source = folder / "unet" / onnx.NAME
        if not source.exists():
            onnx.export(handle, shape, folder, dynamic_size=False)
        build(source, target, arch=arch, clips=clips)
    return load(target, handle.model.device)


def engine_path(folder: Path, arch: str) -> Path:
    """Where an export's engine for an architecture lies."""
    return Path(folder) / "unet" / f"model.{arch}.engine"


def load(path: Path, device: torch.device | str = "cuda") -> Engine:
    """A built engine as a step.

    Raises:
        ArtifactError: it is damaged, of another version or for another architecture, or TensorRT
            or a GPU is missing.
    """
    from tvkernels.runtime._engine import Engine

    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"no file {path}: give an engine that `tvk export` wrote")
    about = files.read(path.with_suffix(".json"), "tensorrt")
    name, trt = library()
    built, here = (about["library"], about["library_version"]), (name, version(name))
    if built != here:
        raise ArtifactError(
            f"{path} was built by {' '.join(built)}, here is {' '.join(here)}: build it again"
        )
    check_device(about["arch"], device)
    return Engine(trt, path, about, torch.device(device))
