"""What TensorRT's two libraries need told apart, and what they tell while they work."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from importlib import metadata
from types import ModuleType

from tvkernels.runtime.files import ArtifactError

# Import name -> the packages that may have brought it.
LIBRARIES = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx_bindings.tensorrt_rtx": ("tensorrt-rtx-cu13-bindings",),
}
INSTALL = "pip install tensorrt, or 'tvkernels[tensorrt-rtx]'"


def library() -> tuple[str, ModuleType]:
    """The first of the two that imports: its short name and the module.

    Raises:
        ArtifactError: neither does; why.
    """
    reasons = []
    for name in LIBRARIES:
        try:
            return name.rpartition(".")[2], importlib.import_module(name)
        except (ImportError, OSError) as error:
            reasons.append(f"{name}: {str(error).splitlines()[0]}")
    raise ArtifactError(f"TensorRT is not installed ({'; '.join(reasons)}): {INSTALL}")


def version(name: str) -> str:
    """Of the library with that short name."""
    packages = next(p for key, p in LIBRARIES.items() if key.rpartition(".")[2] == name)
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def flags(trt: ModuleType) -> int:
    """Strongly typed; TensorRT 11 knows nothing else and may have no flag for it."""
    kinds = trt.NetworkDefinitionCreationFlag.__members__
    return 1 << int(kinds["STRONGLY_TYPED"]) if "STRONGLY_TYPED" in kinds else 0


def mark_decomposable(trt: ModuleType, network) -> int:
    """Allows each attention to be taken apart where no fused kernel serves it; their number."""
    if not hasattr(trt, "IAttentionInputLayer"):
        return 0
    count = 0
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings' own way to a subclass
            layer.attention.decomposable = True
            count += 1
    return count


def aim(trt: ModuleType, name: str, config, arch: str) -> None:
    """Tells RTX the architecture; TensorRT itself builds for the GPU that is here."""
    if name != "tensorrt_rtx":
        return
    capability = getattr(trt.ComputeCapability, arch.replace("_", "").upper(), None)
    if capability is None:
        known = [f"sm_{k[2:]}" for k in trt.ComputeCapability.__members__ if k.startswith("SM")]
        raise ArtifactError(f"tensorrt_rtx builds for {', '.join(known)}, not {arch}")
    config.num_compute_capabilities = 1
    config.set_compute_capability(capability, 0)


def logger(trt: ModuleType):
    """Of a builder and a parser."""

    class Logger(trt.ILogger):
        """Keeps the last error, which the builder itself does not raise."""

        def __init__(self):
            trt.ILogger.__init__(self)
            self.last = ""

        def log(self, severity, message):
            if severity <= trt.ILogger.Severity.ERROR:
                self.last = re.sub(r"\s+", " ", message)[:400]

    return Logger()


def monitor(trt: ModuleType, say: Callable[[str], None]):
    """Says what a build is about."""

    class Monitor(trt.IProgressMonitor):
        """One line for each phase of the outermost level; its methods run in other threads."""

        def __init__(self):
            trt.IProgressMonitor.__init__(self)
            self.stopped = False

        def phase_start(self, phase, parent, steps):
            if parent is None:
                say(f"{phase}: {steps} steps")

        def phase_finish(self, phase):
            pass

        def step_complete(self, phase, step):
            return not self.stopped  # False cancels the build

    return Monitor()
