"""ONNX: one file of standard operators that any runtime loads, and ONNX Runtime behind the call.

Initializers keep the parameters' names, not folded into anything, so that one file serves every
tuned clip: `load(..., weights=...)` puts others in their place.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tvkernels._inflate import InflatedHandle
from tvkernels.runtime import files
from tvkernels.runtime.files import ArtifactError
from tvkernels.runtime.plugins import DOMAIN as PLUGIN_DOMAIN
from tvkernels.runtime.plugins import trace
from tvkernels.runtime.program import INPUTS, OUTPUT, Shape

if TYPE_CHECKING:
    from tvkernels.runtime._session import Session

OPTIONS = ("folder", "opset", "threads")
LIVE = False
DTYPES = (torch.float32, torch.float16)  # ONNX's others have no NumPy type to hand over
# Below 18 torch exports by converting versions; opset 26 makes files that do not load.
OPSETS = range(18, 26)
ONE_NODE_ATTENTION = 23  # from this opset on there is an Attention operator
# Protocol buffers end at 2 GiB; half of it leaves room for whoever edits the file.
EXTERNAL_BYTES = 2**30
LARGE = 4  # latents of an example, in multiples of the UNet's halvings
PREFIX = "unet."  # of `VideoStep`'s parameters
NEEDS = ("onnx", "onnxscript")
NAME = "model.onnx"


def why_not(handle: InflatedHandle | None = None) -> list[str]:
    """The packages that are missing."""
    missing = [name for name in (*NEEDS, "onnxruntime") if not importlib.util.find_spec(name)]
    return [f"{name} is not installed: pip install 'tvkernels[export]'" for name in missing]


def serves(shape: Shape) -> object:
    """Every number of clips."""
    return replace(shape, clips=0)


def check_opset(opset: int) -> None:
    """Raises ArtifactError for an opset that makes no valid file."""
    if opset not in OPSETS:
        raise ArtifactError(
            f"opset {opset} is not to be had: use {OPSETS[0]} to {OPSETS[-1]}, 23 or more for one "
            "Attention operator each, 18 for older runtimes"
        )


def export(
    handle: InflatedHandle,
    shape: Shape,
    folder: Path,
    *,
    opset: int = 23,
    dynamic_size: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Writes `folder`/unet/model.onnx, config.json and metadata.json, all or nothing.

    Args:
        handle: of the inflated UNet; its dtype is the file's.
        shape: of one call; the number of frames is a constant, that of clips is not.
        opset: one of `OPSETS`.
        dynamic_size: height and width may change, in multiples of the UNet's halvings.
        say: shows one line to the user.
    Returns:
        The file. Weights of more than `EXTERNAL_BYTES` lie beside it in model.onnx.data.
    Raises:
        ArtifactError: the folder cannot be written, the opset is unknown, a package is missing or
            the checker refuses the file.
    """
    check_opset(opset)
    with files.new_folder(Path(folder) / "unet") as temporary:
        write_into(temporary, handle, shape, opset=opset, dynamic_size=dynamic_size, say=say)
    return Path(folder) / "unet" / NAME


def write_into(
    place: Path, handle: InflatedHandle, shape: Shape, *, opset: int, dynamic_size: bool, say,
    plugins: bool = False,
) -> Path:  # fmt: skip
    """`export` into a folder that is there, whose caller sees to it that it is whole.

    Args:
        plugins: attention as nodes of `plugins`, which TensorRT alone reads.
    """
    missing = [name for name in NEEDS if not importlib.util.find_spec(name)]
    if missing:
        raise ArtifactError(f"{missing[0]} is not installed: pip install 'tvkernels[export]'")
    from tvkernels.runtime._onnx_graph import convert, save

    say("tracing the UNet")
    multiple = 2 ** (len(handle.model.config.block_out_channels) - 1)
    if shape.height % multiple or shape.width % multiple:
        raise ArtifactError(
            f"latents of {shape.height} x {shape.width}: both sides are multiples of {multiple}"
        )
    example = shape
    if dynamic_size:
        # A size of 1 anywhere, as of a pooled 2 x 2 grid, would be a constant of the program.
        sides = {n: max(getattr(shape, n), LARGE * multiple) for n in ("height", "width")}
        example = replace(shape, **sides)
    with _quiet():
        program = trace(handle, example, dynamic_size, plugins)
        say(f"{len(program.graph.nodes)} nodes of PyTorch to opset {opset}")
        model = convert(program, opset, list(INPUTS), OUTPUT)
    about = files.describe(
        handle, shape, "onnx", opset=opset, dynamic_size=dynamic_size,
        multiple=multiple, plugins=plugins,
        prefix=PREFIX, inputs=list(INPUTS), output=OUTPUT,
    )  # fmt: skip
    for key in ("recipe", "versions", "frames", "text"):
        value = about[key]
        model.metadata_props[f"tvkernels.{key}"] = (
            value if isinstance(value, str) else json.dumps(value)
        )
    written = save(model, place / NAME, EXTERNAL_BYTES)
    _check(place / NAME, opset, {PLUGIN_DOMAIN} if plugins else set())
    handle.model.save_config(place)
    files.write(place / files.METADATA, about, [*written, place / "config.json"])
    size = sum(file.stat().st_size for file in written)
    say(f"{len(model.graph)} nodes of ONNX, {size / 1e6:.1f} MB, the checker passes")
    return place / NAME


@contextlib.contextmanager
def _quiet():
    """Without the exporter's advice on packages and future versions."""
    loggers = [logging.getLogger(f"torch.{name}") for name in ("onnx", "export")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


def _check(path: Path, opset: int, known: set[str]) -> None:
    """By path, for a proto of more than 2 GiB cannot be passed.

    Raises:
        ArtifactError: another opset than asked for, an operator that is not ONNX's own, or what
            the checker says.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    imported = {entry.domain: entry.version for entry in model.opset_import}
    foreign = sorted({node.domain for node in model.graph.node} - {""})
    if imported.get("") != opset or set(foreign) - known:
        raise ArtifactError(f"the exporter wrote opsets {imported} and domains {foreign}")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ArtifactError(f"the exporter wrote an invalid file: {error}") from error


def prepare(
    handle: InflatedHandle, shape: Shape, folder=None, opset: int = 23, threads: int | None = None
) -> Session:
    """A step for `accelerate`, with the UNet's weights of now.

    Args:
        folder: an export of this recipe and shape, or where to write one; None keeps one of this
            structure with the other caches, which serves every clip that is tuned.
    """
    if folder is None:
        shape = serves(shape)
        folder = files.artifacts() / f"unet-{files.artifact_key(handle, shape, f'onnx{opset}')}"
    path = Path(folder) / "unet" / NAME
    if not path.exists():
        # Sizes that vary would take the exporter minutes in place of seconds.
        export(handle, shape, Path(folder), opset=opset, dynamic_size=False)
    return load(path, weights=handle.model.state_dict(), threads=threads, whole=True)


def load(
    path: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    threads: int | None = None,
    whole: bool = False,
) -> Session:
    """An exported file as a step.

    Args:
        path: a file that `export` wrote.
        weights: state-dict name -> values in place of the file's own, all or some.
        threads: of ONNX Runtime; None takes torch's number.
        whole: the weights are a UNet's whole state dict; what the program has no use for, as the
            text's projections where projected text comes in, is passed over.
    Raises:
        ArtifactError: the file is damaged or of another version, or weights do not fit it.
    """
    from tvkernels.runtime._session import Session

    reasons = why_not()
    if reasons:
        raise ArtifactError("; ".join(reasons))
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"no file {path}: give one that `tvk export` wrote")
    return Session(
        path, files.read(path.with_name(files.METADATA), "onnx"), weights, threads, whole
    )
