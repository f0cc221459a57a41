"""torch.compile: a graph for every step, prompt, pattern and number of frames."""

from __future__ import annotations

import torch
from torch import Tensor

from tvkernels._inflate import InflatedHandle
from tvkernels.runtime.program import Shape, VideoStep
from tvkernels.runtime.settings import FLOATS, compile_settings

# A block is the same code as the next one but for where its text lies: a number that varies. There
# is a graph for each size, at most five of Stable Diffusion's and each for one clip and for two.
REGIONAL = {"allow_unspec_int_on_nn_module": True, "recompile_limit": 64}
OPTIONS = ("mode", "regional", "compiler")
LIVE = True
DTYPES = FLOATS


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
            so that what else calls the UNet runs them too, at the sizes that a step has had;
            None takes `settings`.
        compiler: torch.compile's backend.
    """
    chosen = compile_settings(handle.model.device.type)
    regional = chosen.regional if regional is None else regional
    how = {"fullgraph": True, "backend": compiler}
    if compiler == "inductor":
        mode = chosen.mode if mode is None else mode
        how |= {"mode": mode} if mode is not None else {"options": dict(chosen.inductor)}
    step = VideoStep(handle.model)
    if regional:
        handle.compile_blocks(**how)
        return CompiledStep(handle, step, REGIONAL)
    # Not `handle.model.compile`: that would change what training calls too.
    return CompiledStep(handle, torch.compile(step, **how))


class CompiledStep:
    """Calls a compiled step with every pattern a table, and sizes that vary said to vary.

    Args:
        handle: of the inflated UNet.
        step: a compiled `VideoStep`.
        config: torch._dynamo's settings for it.
    """

    def __init__(self, handle: InflatedHandle, step, config: dict | None = None):
        self.handle, self.step = handle, step
        self.config = {} if config is None else config

    def __call__(self, sample: Tensor, timestep: Tensor, text: Tensor, tables=None, **more):
        """As `VideoStep.forward`, samples being [B, F, 4, h, w]."""
        if "tokens" in more and self.config is REGIONAL:
            # They would be compiled again at each layer, for the maps that the others have given.
            raise ValueError("blocks compiled apart give no maps of words: leave out regional")
        if tables is None:
            tables = self.handle.tables(sample.shape[1], sample.device)
        # Clips are not among them: inversion has one, guidance two, and each has its graph.
        torch._dynamo.maybe_mark_dynamic(sample, 1)
        with torch._dynamo.config.patch(**self.config):
            return self.step(sample, timestep, text, tables, **more)
