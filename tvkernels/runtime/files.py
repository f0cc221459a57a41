"""Exported folders: written whole or not at all, with metadata that is verified on reading."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tvkernels._files import atomic_path
from tvkernels._inflate import InflatedHandle
from tvkernels.patterns import FramePattern
from tvkernels.processors.touched import every, guests
from tvkernels.recipes import Recipe
from tvkernels.runtime.program import Shape, mixes_frames

FORMAT = 1
METADATA = "metadata.json"
PACKAGES = ("tvkernels", "torch", "triton", "diffusers", "onnx", "onnxscript", "onnxruntime")


class ArtifactError(ValueError):
    """An exported file cannot be written, or not be used here: one line that says what would."""


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes it at the end; on any failure it is removed.

    Raises:
        ArtifactError: `target` is there already, or cannot be written.
    """
    check_new(target)
    temporary = target.with_name(f".{target.name}-{os.getpid()}")
    made = [parent for parent in target.absolute().parents if not parent.exists()]
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if target.exists():
            target.rmdir()  # empty, says `check_new`
        os.replace(temporary, target)
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            shutil.rmtree(temporary)
        with suppress(OSError):
            for parent in made:
                parent.rmdir()  # refused where it is not empty, as after success


new_file = partial(atomic_path, error=ArtifactError)


def check_new(target: Path) -> None:
    """Raises ArtifactError now if the folder `target` could not be made later."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ArtifactError(f"cannot write {target}: it is there already and not an empty folder")
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ArtifactError(f"cannot write {target}: {folder} is a file, not a folder")
    if not os.access(folder, os.W_OK):
        raise ArtifactError(f"cannot write {target}: no permission to write in {folder}")


def artifacts(folder: str | os.PathLike | None = None) -> Path:
    """Where prepared forms lie that are kept between runs; `folder`, or with the other caches."""
    if folder is not None:
        return Path(folder)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "tvkernels" / "runtime"


def artifact_key(handle: InflatedHandle, shape: Shape, kind: str) -> str:
    """A hash of all that a prepared form depends on but the weights' values."""
    model, device = handle.model, handle.model.device
    content = describe(handle, shape, kind)
    content["config"] = {k: str(v) for k, v in sorted(model.config.items()) if k[0] != "_"}
    content["weights"] = {n: [*t.shape, str(t.dtype)] for n, t in model.state_dict().items()}
    # In the code are numbers, how strong adapters are, and classes that were replaced.
    content["adapters"] = repr(guests(model).adapters)
    content["classes"] = sorted({f"{type(m).__module__}.{type(m).__name__}" for m in every(model)})
    content["device"] = [device.type, torch.backends.cpu.get_cpu_capability()]
    if device.type == "cuda":
        content["device"] = [torch.cuda.get_device_name(device), torch.version.cuda]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def describe(handle: InflatedHandle, shape: Shape, kind: str, **more) -> dict[str, Any]:
    """What an export's metadata says of the UNet; `write` adds its files.

    Args:
        kind: "onnx", "tensorrt" and the like.
        more: entries of the kind.
    """
    mixes = mixes_frames(handle)
    several = "all frames of a clip together, [clips * frames, channels, height, width]"
    return {
        "format": FORMAT,
        "kind": kind,
        "versions": versions(),
        "recipe": describe_recipe(handle.recipe),
        "shape": asdict(shape),
        "dtype": str(handle.model.dtype).removeprefix("torch."),
        "frames": f"exactly {shape.frames} in a clip" if mixes else "any: each is a clip of one",
        "sample": several if mixes else "one frame each, [frames, channels, height, width]",
        "text": "one for each clip" if mixes else "one for each frame",
        **more,
    }


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON; the pattern is its rules, not its rows."""
    pattern = recipe.pattern
    layers = {"": pattern} if isinstance(pattern, FramePattern) else dict(pattern)
    return {
        "name": recipe.name,
        "source": recipe.source,
        "pattern": {prefix: asdict(rules) for prefix, rules in layers.items()},
        "temporal": asdict(recipe.temporal) if recipe.temporal else None,
        "clip_group_norm": recipe.clip_group_norm,
        "temporal_unet": asdict(recipe.temporal_unet) if recipe.temporal_unet else None,
    }


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def write(path: Path, content: dict[str, Any], files: Sequence[Path]) -> None:
    """Writes metadata, with the sizes and sums of `files`, which lie beside `path`."""
    sums = {file.name: {"bytes": file.stat().st_size, "sha256": digest(file)} for file in files}
    with new_file(path) as temporary:
        temporary.write_text(
            json.dumps({**content, "files": sums}, indent=2) + "\n", encoding="utf-8"
        )


def read(path: Path, kind: str) -> dict[str, Any]:
    """The metadata at `path`, its files verified.

    Args:
        kind: what it must describe.
    Raises:
        ArtifactError: missing, damaged, of another format or kind, or a file is not the one that
            was written.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found, files = content["format"], content["files"]
    except FileNotFoundError:
        raise ArtifactError(f"no {path}: give a folder that `tvk export` wrote") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}): export again") from None
    if found != FORMAT:
        made = content.get("versions", {}).get("tvkernels", "an unknown version")
        raise ArtifactError(
            f"{path} is of format {found} (tvkernels {made}), this version reads {FORMAT}: "
            "export again"
        )
    if content.get("kind") != kind:
        raise ArtifactError(f"{path} describes {content.get('kind')}, not {kind}")
    for name, expected in files.items():
        _verify(path.with_name(name), expected)
    return content


def _verify(file: Path, expected: dict[str, Any]) -> None:
    if not file.is_file():
        raise ArtifactError(f"{file} is missing: export again")
    size = file.stat().st_size
    if size != expected["bytes"]:
        what = "is truncated" if size < expected["bytes"] else "is not the file that was written"
        raise ArtifactError(f"{file} {what}: {size} bytes of {expected['bytes']}; export again")
    if digest(file) != expected["sha256"]:
        raise ArtifactError(f"{file} is damaged: its checksum differs; export again")


def digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            found.update(block)
    return found.hexdigest()


def check_call(content: dict[str, Any], sample, timestep, text) -> int:
    """The number of clips in a call.

    Raises:
        ValueError: what is called does not fit what was exported; the text says what would.
    """
    shape, dtype = content["shape"], content["dtype"]
    clips, frames = text.shape[0], shape["frames"]
    tokens, width = shape["text"]
    height, wide = sample.shape[-2:]
    images = [clips * frames, shape["channels"], height, wide]
    if list(sample.shape) != images or list(text.shape) != [clips, tokens, width]:
        raise ValueError(
            f"this export takes text [clips, {tokens}, {width}] and a sample [clips * {frames}, "
            f"{shape['channels']}, height, width], got {list(text.shape)}, {list(sample.shape)}"
        )
    multiple = content["multiple"]
    fixed = None if content["dynamic_size"] else (shape["height"], shape["width"])
    if height % multiple or wide % multiple or fixed not in (None, (height, wide)):
        allowed = f"multiples of {multiple}" if fixed is None else f"{fixed[0]} x {fixed[1]}"
        raise ValueError(f"this export takes latents of {allowed}, got {height} x {wide}")
    row = [] if shape["time"] is None else [1, shape["time"]]
    if list(timestep.shape) != row:
        raise ValueError(f"this export takes a timestep {row}, got {list(timestep.shape)}")
    for tensor in (sample, text):
        if str(tensor.dtype) != f"torch.{dtype}":
            raise ValueError(f"this export computes in {dtype}, got {tensor.dtype}")
    return clips
