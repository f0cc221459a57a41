"""`make gpu`: every op right on the device, the same bits every time, and what it says."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tvkernels._dispatch import OPS
from tvkernels.benchmarks import cases
from tvkernels.benchmarks.ops import gate, gpu, run
from tvkernels.ops import specs

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SPECS = specs()
TEMPORAL = SPECS["temporal_attention"]


def run_gate(op, backend="cpu", dtype=torch.float32, **options):
    some = ("small", "scaled", "one_frame", "no_batch")
    chosen = [j for j in gate.jobs(SPECS[op], (backend,), real=False) if j.case in some]
    return list(gate.run(SPECS[op], dtype, CPU, chosen, **options))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_gate_passes_what_is_right(dtype):
    rows = run_gate("temporal_attention", dtype=dtype)
    assert {row["status"] for row in rows} == {"right"}
    assert {row["backward"] for row in rows} == {True, False}
    assert {row["layout"] for row in rows} == {"dense", "permuted"}
    assert all(row["error"] <= row["budget"] for row in rows)


def test_gate_order_and_kernels():
    order = gate.jobs(TEMPORAL, ("triton", "cpu"))
    real = [j for j in order if j.case.startswith("sd")]
    assert {j.backend for j in real} == {"triton"} and {j.backward for j in real} == {True, False}
    first_repeat = next(i for i, j in enumerate(order) if j.repeats)
    assert all(j.repeats and j.backend == "triton" for j in order[first_repeat:])
    assert {j.case for j in order[first_repeat:]} == set(TEMPORAL.cases)
    assert not any(j.backward for j in gate.jobs(SPECS["latent_blend"], ("cpu",)))


def test_gate_sees_faults(broken):
    broken("temporal_attention", lambda out: out * 1.001)
    rows = [row for row in run_gate("temporal_attention") if not row["case"].startswith("no_")]
    assert {row["status"] for row in rows} == {"wrong"}
    assert all("above its budget" in row["reason"] for row in rows)


def test_gate_sees_races(broken):
    job, runs = gate.Job("small", "cpu", repeats=True), []
    assert gate.repeat(TEMPORAL, job, torch.float32, CPU)["status"] == "right"
    broken("temporal_attention", lambda out: runs.append(0) or out + (len(runs) == 7) * 1e-6)
    found = gate.repeat(TEMPORAL, job, torch.float32, CPU)
    assert found["status"] == "wrong" and found["reason"].startswith("1 of 20 runs")
    assert len(runs) == gate.RUNS


def test_gate_sees_races_of_what_is_written_in_place(broken, monkeypatch):
    spec, job = SPECS["latent_blend"], gate.Job("one_mask", "cpu", repeats=True)
    assert gate.repeat(spec, job, torch.float32, CPU)["status"] == "right"
    forward = OPS["latent_blend"].backend("cpu").forward

    def racing(foreground, *args):
        forward(foreground, *args)
        foreground += torch.rand(())

    monkeypatch.setattr(OPS["latent_blend"].backend("cpu"), "forward", racing)
    assert gate.repeat(spec, job, torch.float32, CPU)["status"] == "wrong"


@pytest.mark.interpreter
def test_gate_calls_nothing_a_race_that_is_no_kernel():
    pytest.importorskip("triton")
    for op, expected in (("temporal_conv", "composed PyTorch"), ("atlas_splat", None)):
        case = SPECS[op].small_cases[0]
        job = gate.Job(case, "triton", backward=True, repeats=True)
        reasons = gate.refusals(SPECS[op], job, torch.float32, CPU)
        assert expected in reasons[0] if expected else not reasons
        plain = gate.Job(case, "triton", backward=True)
        assert not gate.refusals(SPECS[op], plain, torch.float32, CPU)


def test_gate_says_what_it_leaves_out(broken, monkeypatch):
    rows = run_gate("temporal_attention", until=0)
    assert {(row["status"], row["reason"]) for row in rows} == {("skipped", "no time was left")}
    rows = run_gate("temporal_attention", "cuda")
    assert {row["status"] for row in rows} == {"refused"}

    def fail(out):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    broken("temporal_attention", fail)
    monkeypatch.setattr(gate, "lost", lambda device: True)
    seen = []
    with pytest.raises(gate.DeviceLost, match="illegal memory access"):
        seen += gate.run(TEMPORAL, torch.float32, CPU, gate.jobs(TEMPORAL, ("cpu",)), math.inf)


def test_gpu_summary(monkeypatch):
    checked = dict.fromkeys(("case", "dtype", "layout", "reason", "backward"), None)
    right = checked | {"step": "check", "op": "instance_center", "backend": "triton",
                       "status": "right"}  # fmt: skip
    ops = ["instance_center"]
    assert gpu.summary([right], [], ops) == []
    refused = right | {"status": "refused", "reason": "ptxas 12.8"}
    assert gpu.summary([refused], [], ops) == ["NEVER RUN: instance_center on triton: ptxas 12.8"]
    # The CUDA library is one that a machine may do without; built, it has to run.
    cuda = {"op": "guided_ddim_step", "backend": "cuda"}
    rows = [right | {"op": "guided_ddim_step"}, refused | cuda]
    for missing, faults in ((["not built"], 0), ([], 1)):
        monkeypatch.setattr(gpu._native, "why_not", lambda part, reasons=missing: reasons)
        assert len(gpu.summary(rows, [], ["guided_ddim_step"])) == faults
    (fault,) = gpu.summary([right, right | {"status": "wrong", "reason": "off"}], [], ops)
    assert fault == "WRONG: check instance_center triton: off"
    rival = dict.fromkeys(run.FIELDS) | {"op": "instance_center", "provider": "sdpa-flash",
                                         "status": "wrong", "reason": "off"}  # fmt: skip
    assert gpu.summary([right], [rival], ops) == []
    assert len(gpu.summary([right], [rival | {"provider": "triton"}], ops)) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_without_a_device_is_one_line(capsys, tmp_path):
    assert gpu.main(["--output", str(tmp_path / "new")]) == 1
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1
    assert "sees no CUDA device; nothing was run" in said.err and not (tmp_path / "new").exists()


def test_gpu_starts_a_pass_again_behind_the_case_it_died_at(tmp_path, monkeypatch):
    started = []

    def start(command, **options):
        first = int(command[command.index("--first") + 1])
        started.append((int(command[command.index("--pass") + 1]), first))
        died = started == [(0, 0)]
        if died:  # after the rows of one case
            row = dict.fromkeys(run.FIELDS) | {"op": "a", "case": "b", "status": "timed"}
            gpu._append(plan.times, row)
        return SimpleNamespace(wait=lambda seconds: None, returncode=-11 if died else 0)

    fake = SimpleNamespace(Popen=start, DEVNULL=-1, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(gpu, "subprocess", fake)
    plan = gpu.Plan(CPU, ["latent_blend"], 1, tmp_path, ["python"])
    gpu.benching(plan, math.inf)
    passes = [i for i, (_, names, *_) in enumerate(gpu.PASSES) if names is not gpu.SLOW]
    assert started == [(0, 0), (0, 2), *((i, 0) for i in passes[1:])]
    last = gpu._rows(plan.times)[-1]
    assert last["status"] == "wrong" and "status -11 after 1 cases" in last["reason"]
    assert len(gpu.summary([], [last], [])) == 1


@pytest.mark.slow
def test_rehearsal_from_a_checkout_with_torch_alone(tmp_path):
    """`python benchmarks`, as `make gpu` calls it, where nothing else can be imported."""
    missing = ["typer", "rich", "numpy", "diffusers", "matplotlib", "pydantic", "yaml", "pytest"]
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({missing}))\n",
        encoding="utf-8",
    )
    words = ["--device", "cpu", "--small", "--op", "latent_blend", "--minutes", "4"]
    result = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks"), *words, "--output", str(tmp_path / "out")],
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    rows = [
        json.loads(s)
        for s in (tmp_path / "out/gpu-checks.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    ran = {(row["dtype"], row["status"]) for row in rows if row["backend"] == "cpu"}
    assert ran == {(name, "right") for name in cases.DTYPES}, result.stdout + result.stderr
    assert "latent_blend" in (tmp_path / "out/gpu-ops.md").read_text(encoding="utf-8")
    # A kernel that ships and cannot run here is a fault.
    kernels = [b for b in OPS["latent_blend"].backends if b in ("triton", "cuda")]
    assert result.returncode == bool(kernels)
    assert all(f"NEVER RUN: latent_blend on {name}" in result.stdout for name in kernels)
