"""CUDA graphs: one launch a step, captured once for each shape. Not run on a device yet."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tvkernels._dispatch import OPS
from tvkernels._inflate import InflatedHandle
from tvkernels.patterns import FramePattern
from tvkernels.runtime.program import Shape, VideoStep
from tvkernels.runtime.settings import FLOATS

OPTIONS = ("compiled",)
LIVE = True
DTYPES = FLOATS
WARM_UPS = 3  # what torch's own capture of callables does: lazy set-up is over by then


def serves(shape: Shape) -> object:
    """Every shape: graphs are kept by shape."""
    return None


def why_not(device: str) -> list[str]:
    """A graph is captured on a CUDA device, of kernels alone: composed PyTorch reads tables."""
    if device != "cuda":
        return [f"the UNet is on the {device}, a graph needs CUDA"]
    table = FramePattern.own().table(1, device="cuda")
    x = torch.empty(1, 1, 1, 1, 8, dtype=torch.float16, device="cuda")
    reasons = OPS["frame_attention"].why_not(
        "triton", x, x, x, *table[:2], table.coarse_levels, 0, 0, None, False
    )
    return [f"frame_attention: {reason}" for reason in reasons]


def prepare(handle: InflatedHandle, shape: Shape, compiled: bool = False) -> Graphs:
    """A step that is captured at its first call.

    Args:
        compiled: captures what torch.compile makes of the UNet, in place of the UNet itself.
    """
    if not compiled:
        return Graphs(handle, VideoStep(handle.model))
    from tvkernels.runtime.compile import prepare as prepare_compiled

    return Graphs(handle, prepare_compiled(handle, shape, regional=False))


class Graphs:
    """One graph for each set of input shapes; inputs are copied in, the result is copied out.

    The result is a copy, since the next replay writes where this one did.

    Args:
        handle: of the inflated UNet.
        step: what is captured: as `VideoStep.forward`.
    """

    def __init__(self, handle: InflatedHandle, step):
        self.handle, self.step = handle, step
        self._captured: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self._pool, self._places = None, []

    def __call__(
        self, sample: Tensor, timestep: Tensor, text: Tensor, tables=None, number=None
    ) -> Tensor:
        """As `VideoStep.forward`, samples being [B, F, 4, h, w]; a replay shows no timestep."""
        if tables is None:
            tables = self.handle.tables(sample.shape[1], sample.device)
        inputs = [sample, timestep, text, *(x for table in tables for x in table)]
        model = self.handle.model
        # Graphs hold where the weights were, and how strong adapters were as numbers.
        places = [x.data_ptr() for x in itertools.chain(model.parameters(), model.buffers())]
        places.append(self.handle.adapters)
        if places != self._places:
            self._captured.clear()
            self._places = places
        key = tuple((x.shape, x.dtype) for x in inputs)
        with torch.cuda.device(sample.device):
            if key not in self._captured:
                self._captured[key] = self._capture(inputs, tables)
            graph, held, noise = self._captured[key]
            for to, given in zip(held, inputs, strict=True):
                to.copy_(given, non_blocking=True)
            graph.replay()
            return noise.clone()

    def _capture(self, inputs, tables):
        held = [x.clone() for x in inputs]
        rest = iter(held[3:])
        own = tuple(type(table)(*(next(rest) for _ in table)) for table in tables)

        def step():
            return self.step(*held[:3], own)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            noise = step()
        self._pool = graph.pool()
        return graph, held, noise
