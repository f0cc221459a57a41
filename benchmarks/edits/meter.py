"""What one call costs beside time: floating-point operations, traffic, memory, energy."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from tvkernels._dispatch import OPS
from tvkernels.benchmarks.edits import steps as phases
from tvkernels.runtime import memory

RESET, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
SDPA = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention")


class Meter(TorchDispatchMode):
    """Counts operations and bytes of everything that runs inside.

    Attributes:
        flops: by PyTorch's own formulas. An op of ours counts what its composed form does, and its
            gradient twice that, as `limits` has it.
        bytes: what operators read and write, each of their tensors once; views are free.
    """

    def __init__(self):
        super().__init__()
        self.flops = self.bytes = 0
        self._ours: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "tvkernels":
            with memory._Autograd():  # their gradients by recomputing need it
                result = function(*args, **kwargs)
            self.flops += self._of_ours(function._schema.name.partition("::")[2], args)
        else:
            result = function(*args, **kwargs)
            self.flops += _flops(function, args, kwargs, result)
        if not function.is_view:
            held = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            self.bytes += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in held)
        return result

    def _of_ours(self, name: str, args) -> int:
        *args, _ = args  # the backend
        backward = name not in OPS
        if backward:
            name, args = name.removesuffix("_backward"), args[1:]
        key = f"{name} {[tuple(a.shape) if isinstance(a, Tensor) else a for a in args]}"
        if key not in self._ours:
            self._ours[key] = _composed(name, args)
        return self._ours[key] * (2 if backward else 1)


def _flops(function, args, kwargs, result) -> int:
    packet = function._overloadpacket
    name = packet.__name__
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=result)
    if name.removesuffix("_backward") == SDPA[0]:  # the one for CPUs has no formula
        other = getattr(torch.ops.aten, name.replace(*SDPA))
        return flop_registry[other](*args, out_val=result)
    return 0


def _composed(name: str, args) -> int:
    """Of an op's composed form, on tensors without memory."""

    def empty(x):
        # A table of patterns keeps its values, which are read.
        if not isinstance(x, Tensor) or (name == "frame_attention" and x.dtype == torch.int32):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    form = importlib.import_module(f"tvkernels.ops.{name}.cpu")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        form.forward(*tree_map(empty, list(args)))
    return counter.get_total_flops()


@contextlib.contextmanager
def calls_of(module: nn.Module) -> Iterator[list[int]]:
    """A list of one number: how often a module is called inside."""
    count = [0]

    def add(*_):
        count[0] += 1

    hook = module.register_forward_pre_hook(add)
    try:
        yield count
    finally:
        hook.remove()


@contextlib.contextmanager
def within_memory(device: torch.device) -> Iterator[None]:
    """On a CPU: what asks for more memory than there is gets an error, and is not killed."""
    if device.type != "cpu" or not STATUS.exists():
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    free = _kilobytes(Path("/proc/meminfo"), "MemAvailable")
    limit = _kilobytes(STATUS, "VmSize") + int(0.95 * free)
    if before[1] != resource.RLIM_INFINITY:
        limit = min(limit, before[1])
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def accounted_peak(one, clip: phases.Clip, phase: str, steps: int) -> int:
    """What a phase would hold beyond what is held before it, on fake tensors.

    Args:
        one: a provider; its weights are taken as they are.
        clip: what is edited.
        phase: "inversion" or "sampling".
        steps: of DDIM.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    latents, noise = fake.from_tensor(clip.latents), fake.from_tensor(clip.noise)
    call = phases.phase_call(one, replace(clip, latents=latents, noise=noise), phase, steps, 0)
    given = [*one.unet.parameters(), *one.unet.buffers(), latents, noise]
    with fake, memory.Ledger(given) as ledger:
        call()
    return ledger.peak


def joules(device: torch.device) -> float | None:
    """Energy that a device has taken since its driver was loaded; None where nothing tells it."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(name)
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    except Exception:  # no library, no driver, or a device that does not count
        return None


def resident_peak(job: dict) -> int | None:
    """The most that a fresh process has resident while it runs one phase, weights included.

    Args:
        job: keyword arguments of `phase_once`.
    Returns:
        Bytes; None where the system does not tell them or the process failed.
    """
    if not RESET.exists():
        return None
    # Large blocks go back when they are freed, so that the peak is that of what lives.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tvkernels.benchmarks.edits.meter", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def phase_once(
    method: str, model: str, backend: str, dtype: str, provider: str, runtime: str, phase: str,
    frames: int, size: tuple[int, int], steps: int, tune_steps: int, threads: int,
) -> int:  # fmt: skip
    """Runs one phase of one provider and returns the resident peak of this process meanwhile."""
    from tvkernels.benchmarks.edits import models

    torch.set_num_threads(threads)
    pipe = models.load(method, model, backend=backend, dtype=dtype)
    one = phases.provider(pipe, method, provider, runtime)
    small = phases.clip_of(pipe, method, 1, size)
    clip = phases.clip_of(pipe, method, frames, size)
    del pipe
    phases.phase_call(one, small, phase, 1, 1)()  # libraries and threads come first
    call = phases.phase_call(one, clip, phase, steps, tune_steps)
    with within_memory(clip.latents.device):
        RESET.write_text("5", encoding="utf-8")  # the record of the most begins anew
        call()
    return _kilobytes(STATUS, "VmHWM")


def _kilobytes(file: Path, key: str) -> int:
    """A value of /proc, in bytes."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


if __name__ == "__main__":
    print(phase_once(**json.loads(sys.argv[1])))
