"""Devices and dtypes by the names that people give, and one advice where memory is full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHORT = {dtype: name for name, dtype in DTYPES.items()}
KINDS = ("cuda", "xpu", "mps")  # in the order in which "auto" takes them, before the cpu
# CPUs that multiply in bfloat16: AVX512-BF16, AMX, ARM. Elsewhere it is emulated and slower.
FAST_BFLOAT16 = ("avx512_bf16", "amx_bf16", "amx_tile", "bf16", "sve_bf16")
LACKING = (
    "out of memory", "alloc_failed", "not enough memory", "can't allocate memory", "bad_alloc",
)  # fmt: skip
ADVICE = (
    "take fewer frames, a smaller size or dtype bf16, or give max_memory, which plans for it; "
    "against fragments on a GPU set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
)


class DeviceError(ValueError):
    """A device or dtype that is not there; one line that says which are."""


def devices() -> list[str]:
    """Names of the devices that torch sees: "cpu", "cuda:0", "xpu:0", "mps"."""
    found = ["cpu"]
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind)
        if module.is_available():
            found += [f"{kind}:{index}" for index in range(module.device_count())]
    return found + ["mps"] * torch.backends.mps.is_available()


def pick_device(name: str = "auto") -> torch.device:
    """The device of a name.

    Args:
        name: "cpu", "cuda", "cuda:1", "xpu", "mps"; "auto" takes the first of `KINDS` that is
            there, else the cpu.
    Raises:
        DeviceError: there is no such device; the text lists those that there are.
    """
    name = {"cpu:0": "cpu", "mps:0": "mps"}.get(name, name)  # as tensors say it
    there = devices()
    kinds = dict.fromkeys(each.partition(":")[0] for each in there)
    if name == "auto":
        return torch.device(next((kind for kind in KINDS if kind in kinds), "cpu"))
    if name not in kinds and name not in there:
        raise DeviceError(f"no device {name!r} here: use auto or one of {', '.join(there)}")
    return torch.device(name)


def pick_dtype(
    name: str, device: torch.device | str, embedded: bool = False, tunes: bool = False
) -> torch.dtype:
    """The dtype of a name.

    Args:
        name: a key of `DTYPES`, or "auto": float32 for the embedded model, else bfloat16 where
            the device multiplies in it, float16 on other GPUs, float32 on other CPUs.
        device: what the model runs on.
        embedded: whether it is the model that the package carries.
        tunes: whether it is tuned, which float16 cannot be: "auto" takes float32 instead.
    Raises:
        DeviceError: no such name.
    """
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise DeviceError(f"unknown dtype {name!r}: use auto, {', '.join(DTYPES)}")
    device = torch.device(device)
    if embedded:
        return torch.float32
    if bfloat16_is_fast(device):
        return torch.bfloat16
    return torch.float32 if device.type == "cpu" or tunes else torch.float16


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 by itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "xpu":
        return torch.xpu.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        can = torch.cpu.get_capabilities()
        return any(can.get(name) for name in FAST_BFLOAT16)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def out_of_memory(error: BaseException) -> bool:
    """Whether a call only lacked memory: libraries say so in words of their own."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in LACKING)


@contextmanager
def memory_advice() -> Iterator[None]:
    """Gives every device's lack of memory one error with one advice; a decorator too.

    Raises:
        torch.OutOfMemoryError: the device's own first line, and what to lower.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error) or ADVICE in str(error):
            raise
        first = str(error).strip().partition("\n")[0].rstrip(". ") or type(error).__name__
        raise torch.OutOfMemoryError(f"out of memory: {first}: {ADVICE}") from error
