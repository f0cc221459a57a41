"""Preprocessing kept by content: tuned weights and inverted latents, atomic and verified."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tvkernels._files import fingerprint

logger = logging.getLogger("tvkernels")


class Cache:
    """A folder of safetensors files named by the hash of what they were made from.

    Args:
        folder: made when first written; by default $XDG_CACHE_HOME/tvkernels, else
            ~/.cache/tvkernels.

    Attributes:
        hits: entries that `load` has found so far.
    """

    def __init__(self, folder: str | Path | None = None):
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.folder = Path(folder) if folder is not None else home / "tvkernels"
        self.hits = 0

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The entry's tensors, or None where there is none or it fails its checksum (said so)."""
        path = self._path(key)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                checksum = (file.metadata() or {}).get("checksum")
        except (SafetensorError, OSError) as error:
            logger.warning("cache entry %s cannot be read (%s): computing it again", path, error)
            return None
        if checksum != fingerprint(tensors):
            logger.warning("cache entry %s fails its checksum: computing it again", path)
            return None
        self.hits += 1
        return tensors

    def save(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes an entry in one step: readers see all of it or nothing.

        A full or read-only disk is said, not raised: minutes of tuning are worth more than that.
        """
        try:
            self.write(key, tensors)
        except (SafetensorError, OSError) as error:
            logger.warning("cache entry %s cannot be kept: %s", self._path(key), error)

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """As `save`, but what stands in its way is raised: SafetensorError or OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".part")
        os.close(handle)
        try:
            save_file(tensors, temporary, metadata={"checksum": fingerprint(tensors)})
            os.replace(temporary, self._path(key))
        finally:
            Path(temporary).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def content_key(**parts: Any) -> str:
    """A hash of tensors, modules and plain values by name, equal where all content is equal."""
    plain = {name: _describe(part) for name, part in parts.items()}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:32]


def adapted(module: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Layers that LoRA and its kin have put something around, by name."""
    return [
        (name, layer) for name, layer in module.named_modules()
        if hasattr(layer, "base_layer") and hasattr(layer, "active_adapters")
    ]  # fmt: skip


def adapters(module: torch.nn.Module) -> str:
    """What LoRA and its kin add to a module, and how much of it counts; "" where there is none."""
    found = adapted(module)
    added = {
        f"{name}.{part}": tensor
        for name, layer in found
        for part, tensor in layer.state_dict().items()
        if not part.startswith("base_layer.")
    }
    counts = [
        (name, layer.active_adapters, layer.disable_adapters, getattr(layer, "scaling", None))
        for name, layer in found
    ]
    return f"{fingerprint(added)} {counts!r}" if found else ""


def _describe(part: Any) -> Any:
    if isinstance(part, Tensor):
        return fingerprint({"": part})
    if isinstance(part, torch.nn.Module):
        return fingerprint(part.state_dict()) + adapters(part)
    return part if isinstance(part, (str, int, float, bool, type(None))) else repr(part)
