"""What a row of results says of the machine and the software it was measured with."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch


@cache
def facts(device: torch.device) -> dict:
    """Device, driver, versions and commit; the same for every row of a run.

    Returns:
        "device", "driver", "torch", "triton", "ptxas", "unsafe_ptxas", "commit"; None where there
        is none.
    """
    found = {"device": device_name(device), "driver": driver(device), "torch": torch.__version__}
    return found | _triton() | {"commit": commit()}


def device_name(device: torch.device) -> str:
    """ "cpu: x86_64, 1 thread" or the GPU's own name with its architecture."""
    if device.type != "cuda":
        threads = torch.get_num_threads()
        name = platform.processor() or platform.machine()
        return f"cpu: {name}, {threads} thread{'s' * (threads > 1)}"
    p = torch.cuda.get_device_properties(device)
    return f"{p.name}, sm_{p.major}{p.minor}"


def driver(device: torch.device) -> str | None:
    """The newest CUDA the driver serves, before it its own version where nvidia-smi tells it."""
    if device.type != "cuda":
        return None
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)  # not in torch 2.11
    number = ask() if ask else 0
    served = f"for CUDA {number // 1000}.{number % 1000 // 10}" if number else None
    return " ".join(filter(None, [_nvidia_smi("driver_version", device), served])) or None


def sm_clock(device: torch.device) -> int | None:
    """Clock of the multiprocessors now, in MHz; None where nothing tells it."""
    if device.type != "cuda":
        return None
    try:
        return int(torch.cuda.clock_rate(device))
    except Exception:  # no pynvml beside torch, or an error of its own kind
        text = _nvidia_smi("clocks.sm", device)
        return int(text) if text and text.isdigit() else None


def today() -> str:
    """Date and time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def commit() -> str | None:
    """The checkout's commit, with a + where files differ from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        name, changes = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout
            for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "-uno"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.strip() + ("+" if changes.strip() else "")


def _triton() -> dict:
    try:
        import triton

        from tvkernels._triton.support import UNSAFE, ptxas_version
    except ImportError:
        return {"triton": None, "ptxas": None, "unsafe_ptxas": False}
    major, minor = ptxas_version()
    return {
        "triton": triton.__version__,
        "ptxas": f"{major}.{minor}" if major else None,
        "unsafe_ptxas": bool(os.environ.get(UNSAFE)),
    }


def _nvidia_smi(field: str, device: torch.device) -> str | None:
    # By its own number: CUDA_VISIBLE_DEVICES renumbers what torch sees.
    gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    words = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "-i", gpu]
    try:
        text = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return text.strip() or None
