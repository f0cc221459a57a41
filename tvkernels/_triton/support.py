"""Every reason against a call of a Triton kernel, and what the toolchain is known to get wrong."""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from importlib import metadata

import torch
import triton
from torch import Tensor

OLDEST_TRITON = (3, 6)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
UNSAFE = "TVKERNELS_UNSAFE_PTXAS"

# triton issues 11781 and 11854: ptxas before 13.3 reuses registers that feed an asynchronous
# wgmma too early, and P @ V of attention is such a product.
SAFE_PTXAS_SM90 = (13, 3)


def why_not(*tensors: Tensor | None, matrices: bool = False) -> list[str]:
    """Reasons against running Triton kernels on these tensors.

    Args:
        tensors: those whose elements the kernels read, None allowed.
        matrices: whether a kernel multiplies matrices: then the ptxas version counts on sm_90.
    """
    tensors = [x for x in tensors if x is not None]
    reasons = []
    if version(triton.__version__) < OLDEST_TRITON:
        reasons.append(f"triton {triton.__version__} is older than 3.6: pip install -U triton")
    odd = {str(x.dtype) for x in tensors if x.is_floating_point()} - {str(d) for d in DTYPES}
    if odd:
        reasons.append(f"no kernel for {', '.join(sorted(odd))}: float16, bfloat16 or float32")
    devices = {x.device for x in tensors}
    if len(devices) > 1:
        reasons.append(f"the tensors are on {', '.join(sorted(map(str, devices)))}")
        return reasons
    (device,) = devices
    if interpreted():
        if any(x.dtype == torch.bfloat16 for x in tensors):
            reasons.append("Triton's interpreter is silently wrong in bfloat16")
        import numpy

        if version(triton.__version__) < (3, 7) and version(numpy.__version__) >= (2, 4):
            reasons.append("the interpreter of Triton 3.6 needs NumPy before 2.4")
    elif device.type != "cuda":
        reasons.append(f"the tensors are on the {device.type}, the kernels need a CUDA device")
    elif torch.version.hip:
        reasons.append("the kernels are for NVIDIA GPUs, this torch is built for ROCm")
    elif torch.cuda.is_available():
        reasons += _device_reasons(device, matrices)
    return reasons


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 was set when triton was imported: kernels run on the host."""
    return bool(triton.knobs.runtime.interpret)


def _device_reasons(device: torch.device, matrices: bool) -> list[str]:
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return [f"compute capability {capability[0]}.{capability[1]}: 8.0 or newer is needed"]
    if matrices and capability == (9, 0) and not os.environ.get(UNSAFE):
        return ptxas_reasons()
    return []


def ptxas_reasons() -> list[str]:
    """Why the ptxas in use must not assemble attention for sm_90, if so."""
    found = ptxas_version()
    if found >= SAFE_PTXAS_SM90:
        return []
    newer = safe_ptxas()
    mend = f"set TRITON_PTXAS_PATH={newer}" if newer else (
        "pip install nvidia-cuda-nvcc and set TRITON_PTXAS_PATH to its ptxas"
    )  # fmt: skip
    return [
        f"ptxas {found[0]}.{found[1]} miscompiles attention on sm_90 (mended in 13.3): {mend} "
        f"({UNSAFE}=1 runs it all the same, unsafe)"
    ]


@cache
def ptxas_version(path: str | None = None) -> tuple[int, int]:
    """(major, minor) of a ptxas, Triton's for sm_90 if None; (0, 0) if there is none that runs."""
    if path is None:
        try:
            path = triton.knobs.nvidia.ptxas.path  # TRITON_PTXAS_PATH where that runs
        except RuntimeError:
            return (0, 0)
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return (0, 0)
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


@cache
def safe_ptxas() -> str | None:
    """Path of the ptxas in the installed package nvidia-cuda-nvcc, if it is right on sm_90."""
    try:
        brought = metadata.files("nvidia-cuda-nvcc") or ()
    except metadata.PackageNotFoundError:
        return None
    paths = [str(file.locate()) for file in brought if file.name == "ptxas"]
    return next((path for path in paths if ptxas_version(path) >= SAFE_PTXAS_SM90), None)


def version(text: str) -> tuple[int, int]:
    """(major, minor) of a version number."""
    numbers = re.findall(r"\d+", text)
    return int(numbers[0]), int(numbers[1])
