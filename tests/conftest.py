"""Fixtures of all tests, and an honest last line about what this machine could not run."""

import importlib.util
import os
import sys
from pathlib import Path

import interpreter
import pytest
import torch

from tvkernels import _native
from tvkernels._dispatch import OPS

# Before anything imports triton: its kernels then run on the host, which is how they are tested.
os.environ.setdefault("TRITON_INTERPRET", "1")

CLIPS = Path(__file__).parents[2] / "shared" / "data"


def pytest_configure(config):
    # Sums depend on how threads split them; one worker of pytest-xdist has one core.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def pytest_collection_finish():
    if found := sys.modules.get("triton.runtime.interpreter"):
        interpreter.hasten(found)


@pytest.fixture
def poisoned():
    """`torch.empty` is filled with NaN, so that a value never written is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    before_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before, warn_only=before_warn)


@pytest.fixture
def clips():
    """The folder of real clips beside the repository; skips where it is missing."""
    if not any(CLIPS.glob("*.mp4")):
        pytest.skip(f"no real clips in {CLIPS}")
    return CLIPS


@pytest.fixture
def broken(monkeypatch):
    """Breaks the cpu backend of an op: `change` is given its result, and each of its gradients."""

    def go(op, change):
        module = OPS[op].backend("cpu")
        forward, backward = module.forward, getattr(module, "backward", None)
        monkeypatch.setattr(module, "forward", lambda *args: change(forward(*args)))
        if backward is not None:
            monkeypatch.setattr(module, "backward", lambda *a: [change(x) for x in backward(*a)])

    return go


def pytest_terminal_summary(terminalreporter):
    missing = []
    if not torch.cuda.is_available():
        missing.append("kernels on a device (make gpu): no CUDA device")
    if importlib.util.find_spec("triton") is None:
        missing.append("interpreter tests: triton is not installed")
    if reasons := _native.why_not("cpu"):
        missing.append(f"native kernels: {'; '.join(reasons)}")
    if not any(CLIPS.glob("*.mp4")):
        missing.append("tests on real clips: no clips beside the repository")
    if missing:
        terminalreporter.write_line(f"cannot be run on this machine: {'; '.join(missing)}")
