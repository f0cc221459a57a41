"""What is kept beside a result: how it came about, on what, and with which versions."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tvkernels.video._files import atomic_path

PACKAGES = (
    "tvkernels", "torch", "diffusers", "transformers", "peft", "safetensors", "numpy", "av",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Python and of every package that makes the result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """For instance "cuda: NVIDIA H200" or "cpu: x86_64, 2 cores, 2 threads"."""
    if device.type in ("cuda", "xpu"):
        return f"{device.type}: {getattr(torch, device.type).get_device_name(device)}"
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    if device.type != "cpu":
        return f"{device.type}: {machine}"
    return f"cpu: {machine}, {torch.get_num_threads()} threads"


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file in one step.

    Raises:
        VideoError: it cannot be written.
    """
    with atomic_path(path) as temporary:
        # A name that is no UTF-8 has lone surrogates: JSON's own escapes keep them.
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
