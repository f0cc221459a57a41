"""No preparation: PyTorch calls layer after layer, our ops inside."""

from __future__ import annotations

from tvkernels._inflate import InflatedHandle
from tvkernels.runtime.program import Shape, VideoStep
from tvkernels.runtime.settings import FLOATS

OPTIONS = ()
LIVE = True
DTYPES = FLOATS


def serves(shape: Shape) -> object:
    """Every shape."""
    return None


def why_not(device: str) -> list[str]:
    """Runs wherever the UNet does."""
    return []


def prepare(handle: InflatedHandle, shape: Shape) -> VideoStep:
    """The UNet itself."""
    return VideoStep(handle.model)
