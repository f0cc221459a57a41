"""Devices and dtypes by name, on machines that are not here, and one advice for full memory."""

import pytest
import torch

from tvkernels import devices
from tvkernels.devices import DeviceError, memory_advice, pick_device, pick_dtype

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def machine(monkeypatch):
    """Pretends to one: counts of cuda and xpu devices, whether mps is there, capabilities."""

    def go(cuda=0, xpu=0, mps=False, capability=(9, 0), cpu=()):
        for module, count in ((torch.cuda, cuda), (torch.xpu, xpu)):
            monkeypatch.setattr(module, "is_available", lambda count=count: count > 0)
            monkeypatch.setattr(module, "device_count", lambda count=count: count)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda **options: True)
        can = dict.fromkeys(cpu, True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can, raising=False)

    return go


@pytest.mark.parametrize(
    ("there", "auto", "names"),
    [
        ({}, "cpu", ["cpu"]),
        ({"cuda": 2}, "cuda", ["cpu", "cuda", "cuda:0", "cuda:1"]),
        ({"mps": True}, "mps", ["cpu", "mps"]),
        ({"xpu": 1}, "xpu", ["cpu", "xpu", "xpu:0"]),
        ({"cuda": 1, "mps": True}, "cuda", ["cuda", "mps"]),
    ],
)
def test_a_device_is_what_the_machine_has(machine, there, auto, names):
    machine(**there)
    assert pick_device() == torch.device(auto)
    assert [pick_device(name) for name in names] == [torch.device(name) for name in names]
    for name in {"cpu:1", "cuda:2", "xpu:1", "mps:1", "tpu", "", "cuda", "mps", "xpu"} - {*names}:
        with pytest.raises(DeviceError, match=r"use auto or one of cpu"):
            pick_device(name)


@pytest.mark.parametrize(
    ("there", "device", "auto"),
    [
        ({"cuda": 1}, "cuda", BF16),
        ({"cuda": 1, "capability": (8, 0)}, "cuda:0", BF16),
        ({"cuda": 1, "capability": (7, 5)}, "cuda", F16),
        ({"mps": True}, "mps", F16),
        ({"xpu": 1}, "xpu", BF16),
        ({"cpu": ("avx512_bf16",)}, "cpu", BF16),
        ({"cpu": ("amx_bf16",)}, "cpu", BF16),
        ({"cpu": ("bf16",)}, "cpu", BF16),
        ({"cpu": ("avx512_f", "avx2")}, "cpu", F32),
    ],
)
def test_auto_takes_what_the_device_multiplies_in(machine, there, device, auto):
    machine(**there)
    assert pick_dtype("auto", device) == auto
    assert pick_dtype("auto", device, tunes=True) == (F32 if auto == F16 else auto)
    assert pick_dtype("auto", device, embedded=True) == F32
    for name, dtype in (("fp32", F32), ("bf16", BF16), ("fp16", F16)):
        assert pick_dtype(name, device, embedded=True) == dtype
    with pytest.raises(DeviceError, match="use auto, fp32, bf16, fp16"):
        pick_dtype("fp8", device)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore."),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        MemoryError(),
    ],
)
def test_every_lack_of_memory_gets_one_advice(error):
    @memory_advice()
    def work():
        with memory_advice():
            raise error

    with pytest.raises(torch.OutOfMemoryError, match="expandable_segments:True") as caught:
        work()
    assert str(caught.value).count(devices.ADVICE) == 1
    assert "\n" not in str(caught.value)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="^shapes differ$") as caught, memory_advice():
        raise RuntimeError("shapes differ")
    assert type(caught.value) is RuntimeError
