"""torch.compile: a graph for every step, prompt, pattern and number of frames."""

from __future__ import annotations

import torch
from torch import Tensor

from tvkernels.inflate import InflatedHandle
from tvkernels.runtime.program import Shape, VideoStep
from tvkernels.runtime.settings import compile_settings

OPTIONS = ("mode", "regional", "compiler")
LIVE = True


def serves(shape: Shape) -> object:
    """Every shape: torch.compile tells them apart itself."""
    return None


def why_not(device: str) -> list[str]:
    """What Inductor needs."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    if device == "cpu":
        try:
            get_cpp_compiler()
        except Exception as error:
            return [f"torch.compile for CPUs needs a C++ compiler: {error}"]
    elif not torch.utils._triton.has_triton():
        return ["torch.compile for GPUs needs triton"]
    return []


def prepare(
    handle: InflatedHandle,
    shape: Shape,
    mode: str | None = None,
    regional: bool | None = None,
    compiler: str = "inductor",
):
    """A step whose first call compiles.

    Args:
        mode: torch.compile's; None takes `settings`.
        regional: compile each transformer block for itself, in place until the handle is removed,
            so that what else calls the UNet runs them too; None takes `settings`.
        compiler: torch.compile's backend.
    """
    chosen = compile_settings(handle.model.device.type)
    regional = chosen.regional if regional is None else regional
    how = {"fullgraph": True, "backend": compiler}
    if compiler == "inductor":
        how["mode"] = chosen.mode if mode is None else mode
    step = VideoStep(handle.model)
    if regional:
        handle.compile_blocks(**how)
        return CompiledStep(handle, step)
    # Not `handle.model.compile`: that would change what training calls too.
    return CompiledStep(handle, torch.compile(step, **how))


class CompiledStep:
    """Calls a compiled step with every pattern a table, and sizes that vary said to vary.

    Args:
        handle: of the inflated UNet.
        step: a compiled `VideoStep`.
    """

    def __init__(self, handle: InflatedHandle, step):
        self.handle, self.step = handle, step

    def __call__(self, sample: Tensor, timestep: Tensor, text: Tensor, tables=None) -> Tensor:
        """As `VideoStep.forward`, samples being [B, F, 4, h, w]."""
        if tables is None:
            tables = self.handle.tables(sample.shape[1], sample.device)
        # Clips are not among them: inversion has one, guidance two, and each has its graph.
        torch._dynamo.maybe_mark_dynamic(sample, 1)
        return self.step(sample, timestep, text, tables)
