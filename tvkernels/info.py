"""What this installation is and what runs on it: `python -m tvkernels.info`, with torch alone."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
from importlib import metadata

import torch

import tvkernels
from tvkernels import _native
from tvkernels._dispatch import BACKENDS, OPS
from tvkernels.devices import devices, pick_device, pick_dtype
from tvkernels.ops import NAMES
from tvkernels.runtime import BACKENDS as RUNTIMES
from tvkernels.runtime import why_not
from tvkernels.testing.calls import build, registered_arguments

PACKAGES = ("triton", "diffusers", "transformers", "accelerate", "av", "xformers", "flash-attn")
NOT_INSTALLED = "not installed"


def report() -> dict:
    """Versions, devices, and for every op and backend all reasons why it cannot run.

    Returns:
        ``versions`` (name -> version or "not installed"), ``devices`` (one text each), ``auto``
        (the device and, except for the embedded model, the dtype that an edit takes by itself),
        ``sample`` (device and dtype of the sample calls), ``ops`` (op -> ``case``, the named case
        sampled, and ``backends``: backend -> list of reasons, empty where it runs), ``runtimes``
        (runtime -> list of reasons); all of it fits JSON.
        A backend is asked, not tried: no kernel runs.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    chosen = pick_device()
    return {
        "versions": _versions(),
        "devices": _devices(),
        "auto": {"device": str(chosen), "dtype": _plain(pick_dtype("auto", chosen))},
        "sample": {"device": device, "dtype": _plain(dtype)},
        "ops": {name: _op(name, device, dtype) for name in NAMES},
        "runtimes": {name: _runtime(name, device) for name in RUNTIMES},
    }


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _versions() -> dict[str, str]:
    versions = {
        "tvkernels": tvkernels.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "CUDA runtime": torch.version.cuda or "none, this torch is built without CUDA",
        "CUDA driver": _driver(),
    }
    for package in PACKAGES:  # from their metadata: importing one could fail or probe a device
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = NOT_INSTALLED
    versions["ptxas"] = _ptxas()
    versions["native, CPU"] = _library("cpu")
    versions["native, CUDA"] = _library("cuda")
    return versions


def _library(part: str) -> str:
    """Whether a compiled library is used, and a CPU one's instruction set; else all reasons."""
    reasons = _native.why_not(part)
    if reasons:
        return "; ".join(reasons)
    return f"{_native.level()} kernels" if part == "cpu" else "runs"


def _ptxas() -> str:
    """The assembler behind Triton's kernels: some versions are wrong on some architectures."""
    try:
        support = importlib.import_module("tvkernels._triton.support")
    except ImportError:
        return "none, for triton brings it"
    major, minor = support.ptxas_version()
    asked = os.environ.get("TRITON_PTXAS_PATH")
    whose = "TRITON_PTXAS_PATH" if asked and support.ptxas_version(asked)[0] else "triton's own"
    return f"{major}.{minor}, {whose}" if major else f"none that runs, {whose}"


def _driver() -> str:
    """The newest CUDA that the driver serves, as "13.0"."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    number = ask() if ask is not None else 0
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


def _devices() -> list[str]:
    name = platform.processor() or platform.machine()
    found = [f"cpu: {name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads in torch"]
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        found.append(
            f"cuda:{index}: {p.name}, sm_{p.major}{p.minor}, "
            f"{p.multi_processor_count} multiprocessors, {p.total_memory / 2**30:.1f} GiB"
        )
    others = [name for name in devices() if name.partition(":")[0] not in ("cpu", "cuda")]
    return found + [f"{name}: through composed PyTorch, never tried" for name in others]


def _op(name: str, device: str, dtype: torch.dtype) -> dict:
    spec = importlib.import_module(f"tvkernels.ops.{name}.spec").SPEC
    case = spec.small_cases[0]
    try:
        args = _arguments(spec, device, dtype)
    except Exception as error:  # a report of what is broken must not break with it
        reason = f"the sample call failed: {type(error).__name__}: {error}"
        return {"case": case, "backends": {backend: [reason] for backend in BACKENDS}}
    reasons = {backend: OPS[name].why_not(backend, *args) for backend in BACKENDS}
    return {"case": case, "backends": reasons}


def _arguments(spec, device: str, dtype: torch.dtype) -> tuple:
    return registered_arguments(spec, build(spec, spec.small_cases[0], dtype, device=device))


def backend_reasons(backend: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why a small call of frame_attention cannot run on a backend; empty if it can."""
    spec = importlib.import_module("tvkernels.ops.frame_attention.spec").SPEC
    return OPS["frame_attention"].why_not(backend, *_arguments(spec, str(device), dtype))


def _runtime(name: str, device: str) -> list[str]:
    try:
        return why_not(name, device)
    except Exception as error:  # as for ops
        return [f"asking failed: {type(error).__name__}: {error}"]


def text(data: dict) -> str:
    """The report as plain lines."""
    width = max(map(len, data["versions"]))
    lines = [f"{name:<{width}}  {version}" for name, version in data["versions"].items()]
    lines += ["", *data["devices"]]
    taken = data["auto"]
    lines.append(
        f"auto takes {taken['device']} and {taken['dtype']}, float32 of the embedded model"
    )
    lines.append("")
    sample = data["sample"]
    lines.append(f"ops, asked with a small {sample['dtype']} call on {sample['device']}:")
    width = max(map(len, BACKENDS))
    for name, op in data["ops"].items():
        lines.append(f"{name} ({op['case']})")
        for backend, reasons in op["backends"].items():
            lines.append(f"  {backend:<{width}}  {'; '.join(reasons) or 'runs'}")
    lines += ["", f"runtimes for a UNet on {sample['device']}:"]
    width = max(map(len, data["runtimes"]))
    for name, reasons in data["runtimes"].items():
        lines.append(f"  {name:<{width}}  {'; '.join(reasons) or 'runs'}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Prints the report, as text or with ``--json`` as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tvkernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse_args(argv).json
    data = report()
    print(json.dumps(data, indent=2) if as_json else text(data))


if __name__ == "__main__":
    main()
