"""The CUDA part as nvcc builds it for GPUs that are not here, and what stands against calls."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from tvkernels import _device, _native
from tvkernels._dispatch import OPS
from tvkernels._triton.configs import SHARED_LIMITS
from tvkernels.testing import cuda_kernels

compiles = pytest.mark.skipif(
    bool(cuda_kernels.why_not()), reason="; ".join(cuda_kernels.why_not()) or "-"
)


@compiles
@pytest.mark.slow
def test_every_kernel_is_green():
    """No spills, no warnings, matrix instructions and 16-byte accesses where they should be."""
    rows = cuda_kernels.report()
    assert not [(row["kernel"], row["arch"], f) for row in rows for f in row["faults"]]
    assert {row["arch"] for row in rows} == set(SHARED_LIMITS)
    built = {name for name, op in OPS.items() if "cuda" in op.backends}
    assert {row["op"] for row in rows} == built | {"has_code"}
    assert "attend_kernel<__half, 1, 40>" in {row["kernel"] for row in rows}
    for arch, largest in {"sm_80": 145408, "sm_90": 214016}.items():
        own = (row for row in rows if row["arch"] == arch)
        blocks = (
            row for row in own if row["kernel"].startswith("project_attend_kernel<__half, 1,")
        )
        assert max(row["shared_bytes"] for row in blocks) == largest
    if importlib.util.find_spec("triton"):  # which brings cuobjdump
        assert all("hmma" in row for row in rows)


@compiles
@pytest.mark.slow
def test_the_library_imports_the_stable_interface_alone():
    cuda_kernels.build(tuple(SHARED_LIMITS))  # as above, of the objects that it left
    library = cuda_kernels.FOLDER / "lib" / "tvkernels" / "_C_cuda.so"
    known = cuda_kernels.shims(cuda_kernels.torch_headers())
    assert {"torch_call_dispatcher", "aoti_torch_get_current_cuda_stream"} <= known
    assert "torch_from_blob" not in known  # 2.11
    assert cuda_kernels.strangers(library, known) == []
    # The functions of newer versions and torch's own C++ would be seen.
    assert "torch_call_dispatcher" in cuda_kernels.strangers(library, set())


@compiles
def test_a_stranger_is_found(tmp_path):
    source, library = tmp_path / "a.cpp", tmp_path / "a.so"
    source.write_text(
        "namespace at { void add(); } namespace c10 { int f(int); }\n"
        'extern "C" { void torch_from_blob(); void PyList_New(); void torch_call_dispatcher(); }\n'
        "void g() { at::add(); c10::f(1); torch_from_blob(); PyList_New();\n"
        "torch_call_dispatcher(); }\n",
        encoding="utf-8",
    )
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    found = cuda_kernels.strangers(library, {"torch_call_dispatcher"})
    assert found == ["PyList_New", "_ZN2at3addEv", "_ZN3c101fEi", "torch_from_blob"]


def test_unknown_architecture():
    with pytest.raises(ValueError, match="unknown architecture 'sm_70': use one of sm_80"):
        cuda_kernels.report(["sm_70"])


SAID = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z13attend_kernelI6__halfLi1ELi40EEvv' for 'sm_90'
ptxas info    : Function properties for _Z13attend_kernelI6__halfLi1ELi40EEvv
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 45056 bytes smem, 577 bytes cmem[0]
ptxas info    : Compile time = 179.385 ms
ptxas info    : Compiling entry function '_Z5emptyv' for 'sm_100a'
ptxas info    : Function properties for _Z5emptyv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 4 registers, used 0 barriers
"""


def test_the_compilers_words_are_read():
    first, second = cuda_kernels.read_log(SAID)
    assert first == {
        "symbol": "_Z13attend_kernelI6__halfLi1ELi40EEvv", "arch": "sm_90", "registers": 40,
        "stack_bytes": 16, "shared_bytes": 45056, "spill_bytes": 20,
    }  # fmt: skip
    assert (second["symbol"], second["arch"], second["registers"]) == ("_Z5emptyv", "sm_100", 4)
    assert second["shared_bytes"] == second["spill_bytes"] == 0


def test_dynamic_shared_memory_is_read_in_names():
    said = SAID.replace("Li40EEvv", "LN3tvk7DynamicILi2048EEEEvv")
    first, second = cuda_kernels.read_log(said)
    assert (first["shared_bytes"], second["shared_bytes"]) == (45056 + 2048, 0)


def test_kernels_too_large_for_a_device_are_left_out_where_a_smaller_one_serves():
    def row(symbol, arch, shared):
        return {"symbol": symbol, "arch": arch, "shared_bytes": shared}

    small, large = (f"_Z6kernelI6__halfN3tvk7DynamicILi{n}EEEvv" for n in (90000, 200000))
    rows = [
        row(small, "sm_86", 90000), row(large, "sm_86", 200000), row(large, "sm_80", 200000),
        row(small, "sm_90", 90000), row(large, "sm_90", 200000), row("_Zk", "sm_86", 200000),
    ]  # fmt: skip
    assert cuda_kernels.launched(rows) == [rows[i] for i in (0, 2, 3, 4, 5)]


GREEN = {
    "symbol": "_ZN3tvk8temporal13attend_kernelI6__halfLi1ELi40EEEvNS_17TemporalAttentionEb",
    "arch": "sm_86", "registers": 40, "stack_bytes": 0, "spill_bytes": 0, "shared_bytes": 45056,
    "hmma": 11, "wide_reads": 6, "wide_writes": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"stack_bytes": 16}, "keeps 16 on a stack"),
        ({"registers": 0}, "no registers"),
        ({"shared_bytes": SHARED_LIMITS["sm_86"] + 1}, "bytes of shared memory"),
        ({"hmma": 0}, "no matrix instruction"),
        ({"wide_reads": 0}, "no 16-byte read"),
        ({"wide_writes": 0}, "no 16-byte write"),
    ],
)
def test_each_fault_turns_a_row_red(change, fault):
    assert cuda_kernels.faults(GREEN) == []
    (found,) = cuda_kernels.faults(GREEN | change)
    assert fault in found


def test_warnings_are_faults():
    assert cuda_kernels.warnings(SAID) == []
    said = SAID + "ptxas warning : Stack size for entry function cannot be determined\n"
    assert cuda_kernels.warnings(said) == [said.splitlines()[-1]]


def test_the_report_as_a_program():
    result = subprocess.run(
        [sys.executable, "-m", "tvkernels.testing.cuda_kernels"], env={"PATH": "/nowhere"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("nvcc was not found; g++ was not found")


@pytest.fixture
def built(monkeypatch):
    """As if the library were there and its device too."""
    monkeypatch.setattr(_native, "why_not", lambda part, op=None: [])
    monkeypatch.setattr(_device, "_code", lambda device: [])


def refusal(op, *args):
    return OPS[op].backend("cuda").why_not(*args)


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


HOST = "the tensors are on the cpu, the kernels need a CUDA device"


def test_reasons_on_this_machine():
    """Without a library or a device both are said, and auto goes on."""
    x = torch.randn(1, 2, 3, 1, 4)
    reasons = refusal("temporal_attention", x, x, x, None)
    assert HOST in reasons
    if not torch.cuda.is_available():
        assert len(reasons) > 1


@pytest.mark.usefixtures("built")
def test_reasons_of_calls():
    x, long, deep = (
        torch.randn(1, 2, 3, 1, 4),
        torch.zeros(1, 33, 1, 1, 4),
        torch.zeros(1, 2, 1, 1, 161),
    )
    assert refusal("temporal_attention", x, x, x, None) == [HOST]
    assert "33 frames are more than 32" in refusal("temporal_attention", long, long, long, None)
    assert "a head dim of 161 is more than 160" in refusal("temporal_attention", *[deep] * 3, None)
    z, w = meta(1, 33, 2, 396, dtype=torch.float16), meta(396, 396, dtype=torch.float16)
    found = refusal("shift_restricted_temporal_attention", z, w, w, w, w, None, None, None, 9)
    for text in (
        "33 frames are more than 32",
        "9 heads are more than 8",
        "a head dim of 44 is more than 40",
        "396 channels are no multiple of 8",
    ):
        assert text in found
    z, w = meta(1, 2, 2, 8), meta(8, 8)
    found = refusal("shift_restricted_temporal_attention", z, w, w, w, w, None, None, None, 1)
    assert "no kernel for torch.float32: float16 or bfloat16" in found
    wide = x.double()
    text = "no kernel for torch.float64: float16, bfloat16 or float32"
    assert text in refusal("temporal_attention", wide, wide, wide, None)
    assert "the tensors are on cpu, meta" in refusal("temporal_attention", x, meta(1), x, None)
    clip, weight = meta(1, 2, 4, 2**15, 2**15), meta(4)
    assert "a clip of more than 2147483647 elements" in refusal(
        "clip_group_norm", clip, weight, weight, 2, 1e-5, True
    )
    flat = meta(*[1] * 9)
    assert "9 dimensions are more than 8" in refusal(
        "guided_ddim_step", flat, flat, meta(3), None, None
    )
    huge = meta(2**31)
    assert "more than 2147483647 elements" in refusal(
        "guided_ddim_step", huge, huge, meta(3), None, None
    )


@pytest.mark.parametrize(
    ("capability", "has_code", "reason"),
    [
        ((7, 5), True, "compute capability 7.5: 8.0 or newer is needed"),
        ((9, 0), False, "the library was built without code for compute capability 9.0"),
        ((9, 0), True, None),
    ],
)
def test_reasons_of_devices(capability, has_code, reason, monkeypatch):
    _device._code.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    library = type("Library", (), {"has_code": staticmethod(lambda device: has_code)})
    monkeypatch.setattr(_native, "load", lambda part: library)
    found = _device._code(0)
    _device._code.cache_clear()
    assert found == () if reason is None else found[0].startswith(reason)
