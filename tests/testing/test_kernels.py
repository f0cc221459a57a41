"""The offline gates: every kernel compiled for GPUs that are not here, and what turns them red."""

import dataclasses
import importlib.metadata
import json
from pathlib import Path

import pytest
import torch
from fresh import fresh

from tvkernels._dispatch import OPS

pytest.importorskip("triton")

from tvkernels._triton import configs, launch, support
from tvkernels.ops import specs
from tvkernels.testing import kernels

ROOT = Path(__file__).parents[2]
FIELDS = {
    "op", "config", "arch", "registers", "spill_bytes", "shared_bytes", "hgmma", "mufu_ex2",
}  # fmt: skip


def tvk_kernels(*arguments):
    """`tvk kernels` in a process of its own: this one holds the interpreter's kernels."""
    code = "import sys; from tvkernels.__main__ import main; sys.exit(main())"
    return fresh(code, "kernels", *arguments, env={"TRITON_INTERPRET": None})


# Most of the time to compile: .ci/run compiles everything, for every architecture.
LARGE = (
    "clip_group_norm", "frame_attention", "shift_restricted_temporal_attention", "temporal_conv",
)  # fmt: skip
SHIPPED = [name for name, op in OPS.items() if "triton" in op.backends]


@pytest.mark.parametrize(
    "ops",
    [[n for n in SHIPPED if n not in LARGE], pytest.param(LARGE, marks=pytest.mark.slow)],
    ids=("small", "large"),
)
def test_every_shipped_kernel_is_green_on_hopper(ops):
    """In bfloat16, which the kernels are for; `tvk kernels` alone asks for all there is."""
    chosen = (word for name in ops for word in ("--op", name))
    result = tvk_kernels("--arch", "sm_90", "--dtype", "bfloat16", "--json", *chosen)
    rows = json.loads(result.stdout)
    faults = [(row["op"], row["kernel"], row["config"], f) for row in rows for f in row["faults"]]
    assert not faults
    assert result.returncode == 0, result.stderr
    assert all(row.keys() >= FIELDS for row in rows)
    assert {row["op"] for row in rows} == set(ops)
    assert "bf16" in {row["dtype"] for row in rows}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--arch", "sm_70"), "unknown architecture 'sm_70': use one of sm_80, sm_86"),
        (("--op", "attention"), "unknown op with a triton backend 'attention': use one of frame_"),
        (("--dtype", "float64"), "unknown dtype 'float64': use one of float16, bfloat16"),
        (("--arch", "sm_90", "-o", "nowhere/table.md"), "no folder nowhere"),
    ],
)
def test_bad_input_is_one_line(arguments, complaint):
    result = tvk_kernels(*arguments)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert complaint in line


def test_the_interpreter_cannot_compile():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 turns compilation off"):
        kernels.compilations("instance_center", "sm_90")


@pytest.mark.parametrize("name", [n for n, op in OPS.items() if "triton" in op.backends])
def test_launches_fit_a_device(name):
    """Only x reaches beyond 65,535 programs, and a kernel gets its own arguments and no other."""
    launches = list(kernels._launches(OPS[name], specs()[name], "sm_90", torch.bfloat16, None))
    assert launches
    for x in launches:
        assert len(x.grid) == 1 and 0 < x.grid[0] < 2**31
        given = [*x.arguments, *x.constants]
        assert sorted(given) == sorted(x.kernel.arg_names), x.kernel.__name__


COMPILATION = kernels.Compilation(
    "frame_attention", "tvkernels.ops.frame_attention.triton", "_attend", "sm_90",
    (("q", "*bf16"), ("D", "constexpr")), (("D", 40),), (0,), (("num_warps", 4),), "",
)  # fmt: skip
GREEN = {
    "spill_bytes": 0, "shared_bytes": 60_000, "hgmma": 11, "waits": 3, "warps": 4,
    "pending_waits": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": 240_000}, "240000 bytes of shared memory of 232448"),
        ({"hgmma": 0}, "no wgmma"),
        ({"waits": 11}, "wgmma serialised: 11 waits for 11 products"),
        ({"warps": 8}, "wgmma in 8 warps"),
        ({"pending_waits": 2}, "2 waits leave a product in flight"),
    ],
)
def test_each_fault_turns_a_row_red(change, fault, monkeypatch):
    module = OPS["frame_attention"].backend("triton")
    monkeypatch.setattr(module, "WGMMA", ("_attend",), raising=False)
    monkeypatch.setattr(kernels.triton, "__version__", "3.7.0")
    assert kernels.faults(COMPILATION, GREEN) == []
    (found,) = kernels.faults(COMPILATION, GREEN | change)
    assert fault in found


def test_the_hazards_of_hopper_are_asked_of_hopper_only():
    older = dataclasses.replace(COMPILATION, arch="sm_80")
    assert kernels.faults(older, GREEN | {"hgmma": 0, "warps": 8}) == []
    assert kernels.faults(older, GREEN | {"shared_bytes": 200_000})


def test_the_page_sums_up_and_names_every_fault():
    rest = dict.fromkeys(kernels.COLUMNS, 0)
    one, two = (
        rest | GREEN | {"op": "pool", "kernel": "_pool", "config": f"D={d}", "arch": "sm_90",
                        "ptxas": "13.3", "registers": d, "faults": faults}
        for d, faults in ((40, []), (168, ["no wgmma"]))
    )  # fmt: skip
    page = kernels.markdown([one, two]).splitlines()
    assert "| pool | _pool | sm_90 | 2 | 40 to 168 | 0 | 60000 | 0 | 11 | 0 | 0 | 0 | 0 |" in page
    assert "- pool _pool D=168 sm_90: no wgmma" in page and "Faults:" in page
    assert [line for line in page if line.startswith("| D=40 | sm_90 | 40 |")]
    assert "No faults." in kernels.markdown([one])


def test_blocks_per_multiprocessor():
    numbers = {"registers": 168, "shared_bytes": 51_200, "warps": 4}
    assert kernels._blocks("sm_90", numbers) == 3  # 65536 / (168 x 128) registers
    assert kernels._blocks("sm_86", numbers) == 1  # 100 KB / 51 KB
    assert kernels._blocks("sm_80", numbers | {"registers": 32, "shared_bytes": 0}) == 16


def test_configurations_are_chosen_by_fact():
    for name, op in OPS.items():
        if "triton" not in op.backends:
            continue
        entries = configs.entries(name)
        assert all({"kernel", "config", "source"} <= entry.keys() for entry in entries), name
        assert all(entry["source"] for entry in entries), name
    with pytest.raises(LookupError, match="no entry of kernel 'nothing'"):
        configs.choose("instance_center", "nothing", arch="sm_90")


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), "sm_80"), ((8, 7), "sm_86"), ((8, 9), "sm_89"), ((9, 0), "sm_90"),
     ((10, 3), "sm_100"), ((12, 0), "sm_89")],
)  # fmt: skip
def test_a_device_takes_the_nearest_older_configuration(capability, arch):
    assert configs.architecture(*capability) == arch


class Device:
    """What `support` asks of a CUDA device, without one."""

    def __init__(self, monkeypatch, capability, ptxas):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(support, "interpreted", lambda: False)
        monkeypatch.setattr(support, "ptxas_version", lambda: ptxas)
        monkeypatch.setattr(support, "safe_ptxas", lambda: None)
        monkeypatch.delenv(support.UNSAFE, raising=False)


def on_cuda():
    with torch._subclasses.FakeTensorMode():
        return torch.empty(2, dtype=torch.float16, device="cuda")


def test_a_known_bad_ptxas_is_a_reason_on_hopper_and_can_be_overridden(monkeypatch):
    Device(monkeypatch, (9, 0), (12, 8))
    (reason,) = support.why_not(on_cuda(), matrices=True)
    assert "ptxas 12.8 miscompiles attention on sm_90" in reason
    assert "TRITON_PTXAS_PATH" in reason
    assert "pip install nvidia-cuda-nvcc" in reason
    assert support.why_not(on_cuda(), matrices=False) == []
    monkeypatch.setattr(support, "safe_ptxas", lambda: "/newer/ptxas")
    (reason,) = support.why_not(on_cuda(), matrices=True)
    assert "set TRITON_PTXAS_PATH=/newer/ptxas" in reason
    monkeypatch.setenv(support.UNSAFE, "1")
    assert support.why_not(on_cuda(), matrices=True) == []


@pytest.fixture
def ptxas_133(tmp_path, monkeypatch):
    """A package nvidia-cuda-nvcc whose ptxas says that it is 13.3."""
    path = tmp_path / "ptxas"
    path.write_text(
        "#!/bin/sh\necho 'Cuda compilation tools, release 13.3, V13.3.73'\n", encoding="utf-8"
    )
    path.chmod(0o755)
    brought = importlib.metadata.PackagePath("ptxas")
    brought.dist = importlib.metadata.PathDistribution(tmp_path / "none.dist-info")
    monkeypatch.setattr(support.metadata, "files", lambda package: [brought])
    for cached in (support.safe_ptxas, kernels._assembler):
        cached.cache_clear()
    yield str(path)
    for cached in (support.safe_ptxas, kernels._assembler):
        cached.cache_clear()


def test_hopper_is_assembled_by_the_ptxas_that_its_users_need(ptxas_133, monkeypatch):
    monkeypatch.delenv(kernels.PTXAS, raising=False)
    assert kernels._assembler("sm_90") == "13.3.73"
    assert kernels._assembler("sm_80") != "13.3.73"
    with kernels.assembler("sm_90") as path:
        assert path == ptxas_133 == kernels.triton.knobs.nvidia.ptxas.path
    assert kernels.triton.knobs.nvidia.ptxas.path != ptxas_133
    kernels._assembler.cache_clear()
    own = kernels.triton.knobs.nvidia.ptxas.path
    monkeypatch.setenv(kernels.PTXAS, own)
    with kernels.assembler("sm_90") as path:
        assert path == own


def test_a_package_with_an_older_ptxas_is_no_help(ptxas_133):
    Path(ptxas_133).write_text("#!/bin/sh\necho 'release 13.0, V13.0.88'\n", encoding="utf-8")
    support.ptxas_version.cache_clear()
    assert support.safe_ptxas() is None


@pytest.mark.parametrize(("capability", "ptxas"), [((9, 0), (13, 3)), ((8, 9), (12, 8))])
def test_other_pairs_run(monkeypatch, capability, ptxas):
    Device(monkeypatch, capability, ptxas)
    assert support.why_not(on_cuda(), matrices=True) == []


def test_an_old_gpu_says_so(monkeypatch):
    Device(monkeypatch, (7, 5), (13, 3))
    (reason,) = support.why_not(on_cuda())
    assert "compute capability 7.5: 8.0 or newer" in reason


def test_other_reasons(monkeypatch):
    monkeypatch.setattr(support, "interpreted", lambda: False)
    (reason,) = support.why_not(torch.empty(1))
    assert "on the cpu, the kernels need a CUDA device" in reason
    double, single = support.why_not(torch.empty(1, dtype=torch.float64))
    assert "no kernel for torch.float64" in double and "CUDA device" in single
    monkeypatch.setattr(support.triton, "__version__", "3.5.1")
    assert "triton 3.5.1 is older than 3.6" in support.why_not(torch.empty(1))[0]


def test_sizes_are_tritons():
    import triton

    for n in range(1, 300):
        assert configs.next_power_of_2(n) == triton.next_power_of_2(n)
        assert all(configs.cdiv(n, by) == triton.cdiv(n, by) for by in (1, 16, 64, 128))
    assert configs.next_power_of_2(0) == triton.next_power_of_2(0) == 0
    assert configs.cdiv(0, 16) == 0


def test_nothing_is_launched_for_an_empty_grid():
    launch.launch(None, (0,), {}, {})
