"""`tvk bench ops` and `make gpu`: checked before timed, nothing dropped, limits that hold."""

import dataclasses
import gc
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tvkernels import _native
from tvkernels.benchmarks import cases, limits, machine, timing
from tvkernels.benchmarks.ops import checks, dense, flex, gate, report, rivals, run
from tvkernels.ops import NAMES, specs
from tvkernels.processors import libraries
from tvkernels.testing.calls import copied, tensors

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SPECS = specs()
FRAMES, TEMPORAL = SPECS["frame_attention"], SPECS["temporal_attention"]
RATES = limits.Rates(copied_bytes=1e9, flops=1e11, exps=1e9, l2_bytes=None)
LIBRARIES = ("xformers", "flash-attn", "flash-attn-3", "flash-attn-4", "sage")


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module", autouse=True)
def quick(patch):
    """Rates as given, and FlexAttention not compiled: it is right or wrong all the same."""
    patch.setattr(run, "measure_rates", lambda device, dtype: RATES)
    attend = lambda q, k, v, mask, scale: flex_attention(q, k, v, block_mask=mask, scale=scale)  # noqa: E731
    patch.setattr(rivals, "flex_attention", lambda: attend)


@pytest.fixture
def measured(tmp_path):
    """Runs the bench on a CPU for as short as it can."""

    def go(*names, providers=None, file="ops.jsonl", **options):
        op, *some = names
        options = {"device": "cpu", "seconds": 0, "output": tmp_path / file} | options
        return run.run([op], some or None, providers, **options)

    return go


def by_provider(rows, form="as used"):
    return {row["provider"]: row for row in rows if row["form"] in (form, None)}


def test_rows_say_everything_and_are_on_disk(measured, tmp_path):
    said = []
    rows = measured("temporal_attention", "small", providers=["cpu", "reference"], say=said.append)
    assert [list(row) for row in rows] == [list(run.FIELDS)] * 2
    assert [
        json.loads(s) for s in (tmp_path / "ops.jsonl").read_text(encoding="utf-8").splitlines()
    ] == rows
    row = by_provider(rows)["cpu"]
    assert (row["status"], row["timing"], row["checked"]) == ("timed", "host clock", "whole")
    assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"]
    assert row["samples"] >= timing.FEWEST and row["vs_reference"] > 0
    assert row["error"] <= row["budget"] and row["peak_bytes"] > 0
    assert row["percent_of_limit"] == pytest.approx(100 * row["limit_s"] / row["median_s"])
    assert row["shape"] == {"b": 2, "f": 3, "n": 6, "h": 2, "d": 8, "scale": None}
    assert row["device"].startswith("cpu: ") and row["torch"] == torch.__version__ and row["date"]
    assert "on a cpu" in said[0] and all(line.startswith("cpu ") for line in said[1:])
    measured("temporal_attention", "small", providers=["cpu"])
    assert len((tmp_path / "ops.jsonl").read_text(encoding="utf-8").splitlines()) == 3  # appended


def test_every_provider_is_there_or_says_why_not(measured):
    rows = measured("frame_attention", "first_previous")
    found = by_provider(rows)
    assert set(found) == set(rivals.NAMES)
    timed = {"cpu", "reference", "sdpa-flash", "sdpa-math"}
    timed |= set() if _native.why_not("cpu", "frame_attention") else {"native"}
    assert {name for name, row in found.items() if row["status"] == "timed"} == timed
    assert all(row["reason"] for name, row in found.items() if name not in timed)
    assert found["triton"]["reason"] and found["triton"]["status"] == "absent"
    assert found["cuda"]["reason"] == "frame_attention has no cuda backend in this version"
    assert found[rivals.COMPILED]["reason"] == found["flex"]["reason"] == run.SLOW_ON_CPU
    assert found["sdpa-cudnn"]["status"] == "cannot"
    for name in LIBRARIES:
        assert found[name]["status"] == "absent" and "not installed" in found[name]["reason"]
    both = by_provider(rows, form="kernel")
    assert both["sdpa-flash"]["median_s"] and "cpu" not in both and "flex" not in both
    (row,) = measured("frame_attention", "first_previous", providers=["flex"])
    assert row["status"] == "timed"


def test_what_compiles_is_run_where_it_is_named(measured, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    some = {"frame_attention": "fine_coarse2", "temporal_attention": "scaled",
            "latent_blend": "one_mask", "clip_group_norm": "silu"}  # fmt: skip
    for op, case in some.items():
        (row,) = measured(op, case, providers=[rivals.COMPILED])
        assert row["status"] == "timed", row["reason"]


@pytest.mark.parametrize(
    ("change", "reason"),
    (
        (lambda out: out + 1e-2, "above its budget"),
        (torch.empty_like, "not finite"),  # memory never written is poisoned
        (lambda out: out[:, :1], "shape"),
        (lambda out: out.double(), "dtype"),
    ),
)
def test_a_wrong_result_is_said_and_not_timed(measured, broken, change, reason):
    broken("temporal_attention", change)
    rows = measured("temporal_attention", "small", providers=["cpu", "reference"])
    wrong, right = by_provider(rows)["cpu"], by_provider(rows)["reference"]
    assert wrong["status"] == "wrong" and reason in wrong["reason"]
    assert wrong["median_s"] is None and wrong["peak_bytes"] is None
    assert right["median_s"] is not None


def stands_in(monkeypatch, library, attend):
    """`attend` in the place of a library that need not be installed."""
    monkeypatch.setitem(libraries.LIBRARIES, library, ("torch", attend))


def test_a_lossy_rival_is_marked_and_timed(measured, monkeypatch):
    exact = libraries.attention("sdpa-math")
    stands_in(monkeypatch, "sage", lambda *args: exact(*args) + 1e-2)
    row = by_provider(measured("temporal_attention", "small", providers=["sage"]))["sage"]
    assert row["status"] == "lossy" and row["median_s"] and "above its budget" in row["reason"]


def test_a_rival_that_raises_cannot(measured, monkeypatch):
    def refuse(*args):
        raise TypeError("head dim 8\nis not mine")

    stands_in(monkeypatch, "xformers", refuse)
    row = by_provider(measured("temporal_attention", "small", providers=["xformers"]))["xformers"]
    assert (row["status"], row["reason"]) == ("cannot", "TypeError: head dim 8")


def test_one_that_fails_later_leaves_the_others_their_times(measured, monkeypatch):
    exact = libraries.attention("sdpa-math")

    def tiring(error):
        calls = iter(range(10))

        def attend(*args):
            if next(calls):
                raise error
            return exact(*args)

        return attend

    for error, status in (
        (RuntimeError("no graph\nany more"), "cannot"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "skipped"),
    ):
        stands_in(monkeypatch, "xformers", tiring(error))
        rows = by_provider(measured("temporal_attention", "small", providers=["xformers", "cpu"]))
        assert rows["xformers"]["status"] == status and rows["xformers"]["median_s"] is None
        assert rows["cpu"]["status"] == "timed" and rows["cpu"]["median_s"]
    monkeypatch.setattr(run, "interleave", tiring(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")))
    run.interleave(*[torch.zeros(1, 1, 1, 1)] * 3, 1.0)
    (row,) = measured("temporal_attention", "small", providers=["cpu"])
    assert row["status"] == "skipped" and row["error"] is not None


def test_a_deadline_cuts_off_no_whole_op(tmp_path):
    ops = ["frame_attention", "temporal_attention"]
    rows = run.run(ops, None, ["cpu"], device="cpu", deadline=-1.0, output=tmp_path / "ops.jsonl")
    assert [row["op"] for row in rows[:4]] == ops * 2


def test_the_largest_are_not_captured_where_graphs_would_fill_the_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 200))
    candidates = [timing.Candidate(str(n), [], n != 70) for n in (10, 70, 40, 30)]
    run._leave_room(candidates, [10, 70, 40, 30], CPU)
    assert [c.capturable for c in candidates] == [True, False, False, True]


def test_a_driver_that_tells_no_version(monkeypatch):
    """torch 2.11 has no such call, and a machine may have no nvidia-smi."""
    monkeypatch.delattr(torch._C, "_cuda_getDriverVersion", raising=False)
    for told in ("580.1", None):
        monkeypatch.setattr(machine, "_nvidia_smi", lambda *args, told=told: told)
        assert machine.driver(torch.device("cuda")) == told


def test_shift_restricted_rivals_are_trained_more_than_once(measured):
    name = "shift_restricted_temporal_attention"
    case = SPECS[name].small_cases[0]
    (row,) = measured(name, case, providers=["sdpa-math"], backward=True)
    assert row["status"] == "timed", row["reason"]


def test_backward_rows(measured, broken):
    rows = measured("temporal_attention", "small", providers=["cpu", "sdpa-math"], backward=True)
    assert [row["status"] for row in rows] == ["timed"] * 2 and all(r["backward"] for r in rows)
    one, both = (limits.limit(TEMPORAL, "small", torch.float32, RATES, b) for b in (False, True))
    assert (rows[0]["flops"], rows[0]["bytes"]) == (3 * one.flops, 2 * one.bytes)
    assert both.exps == one.exps
    broken("temporal_attention", lambda out: out * 1.001)
    (row,) = measured("temporal_attention", "small", providers=["cpu"], backward=True)
    assert row["status"] == "wrong"
    with pytest.raises(ValueError, match="none of these ops has gradients"):
        measured("latent_blend", backward=True)


def test_no_time_and_no_memory_are_said(measured, monkeypatch):
    (row,) = measured("temporal_attention", "small", deadline=-math.inf)
    assert (row["status"], row["provider"]) == ("skipped", "all") and "time" in row["reason"]

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much")

    monkeypatch.setattr(checks, "truth", full)
    (row,) = measured("temporal_attention", "small")
    assert row["status"] == "skipped" and row["reason"].endswith("CUDA out of memory")


def test_limits():
    case = {"b": 1, "f": 4, "n": 8, "h": 2, "d": 16, "scale": None}
    spec = dataclasses.replace(TEMPORAL, cases={"it": case})
    fast = limits.Rates(1e30, 1e30, 1e30, None)
    for name, rate, count in (("bytes", "copied_bytes", 8192 * 2), ("flops", "flops", 16384),
                              ("exps", "exps", 256)):  # fmt: skip
        rates = dataclasses.replace(fast, **{rate: 1e3})
        found = limits.limit(spec, "it", torch.float32, rates)
        assert (found.bound, found.seconds) == (name, pytest.approx(count / 1e3))
    assert limits.limit(spec, "it", torch.bfloat16, fast).bytes == 8192
    rates = limits.measure_rates(CPU, torch.float32)
    assert rates.l2_bytes is None
    assert min(rates.copied_bytes, rates.flops, rates.exps) > 1e6
    for spec in SPECS.values():
        for case in spec.real_cases:
            assert limits.limit(spec, case, torch.bfloat16, rates).seconds > 0


def test_stand_ins_are_small_and_of_every_op():
    found = cases.line_up(None, None, CPU)
    assert {spec.name for spec, _ in found} == set(NAMES)
    for spec, case in found:
        assert case.endswith(cases.STAND_IN)
        assert spec.bytes(spec.cases[case]) < 2**25 and spec.flops(spec.cases[case]) < 2**31
        shapes = [s.cases[c] for s, c in found if s.name == spec.name]
        assert all(shapes.count(shape) == 1 for shape in shapes)
    pairs = cases.line_up(["frame_attention", "temporal_attention"], ["sd15-64", "lse"], CPU)
    assert [(s.name, c) for s, c in pairs] == [
        ("frame_attention", "lse"),
        ("temporal_attention", "sd15-64"),
    ]


def test_inputs_repeat_and_keep_their_layout():
    first, again, other = (
        tensors(cases.inputs(TEMPORAL, "small", torch.float16, CPU, seed=s)) for s in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0]) and first[0].dtype == torch.float16
    permuted = cases.inputs(TEMPORAL, "small", torch.float16, CPU, layout="permuted")
    assert not tensors(copied(permuted))[0].is_contiguous()


# FlexAttention that is not compiled takes a second a case.
FLEXED = ("own", "first_previous", "ragged", "fine_coarse2", "cached", "sized_ragged", "uneven")


@pytest.mark.parametrize(
    ("op", "name"), [("frame_attention", "flex"), *((op, "sdpa-math") for op in dense.ATTENTION)]
)
def test_rivals_compute_the_same_thing(op, name):
    right = set()
    for case in SPECS[op].small_cases if name != "flex" else FLEXED:
        args = cases.inputs(SPECS[op], case, torch.float32, CPU)
        truth = checks.truth(SPECS[op], args)
        for provider in rivals.line_up(SPECS[op], args, [name]):
            if isinstance(provider, rivals.Absent):
                assert provider.reason
                continue
            out = provider.public(provider.bind(args)())
            verdict = checks.judge(out, truth, only_first=provider.only_first)
            assert verdict.right, (case, provider.form, verdict)
            assert all(x.is_contiguous() for x in out)
            right.add((case, provider.form))
    if op == "frame_attention":
        used = {(case, "as used") for case in ("own", "first_previous", "ragged", "cached")}
        assert used | {("fine_coarse2", "kernel")} <= right
        assert not {"sized_ragged", "lse"} & {case for case, _ in right}


@pytest.mark.parametrize("case", ("own", "first_previous", "fine_coarse2", "ragged", "all"))
def test_flex_block_mask_is_that_of_the_dense_mask(case, monkeypatch):
    monkeypatch.setattr(flex, "BLOCK", 16)  # frames of 16, 24 and 35 tokens: whole, cut, uneven
    args = cases.inputs(FRAMES, case, torch.float32, CPU)
    mask = flex.flex_problem(FRAMES, args).mask
    expected = create_block_mask(
        mask.mask_mod, None, None, *mask.seq_lengths, device="cpu", BLOCK_SIZE=16
    )
    assert torch.equal(mask.to_dense(), expected.to_dense())
    assert torch.equal(mask.kv_num_blocks, expected.kv_num_blocks)
    assert torch.equal(mask.full_kv_num_blocks, expected.full_kv_num_blocks)


@pytest.mark.parametrize("backward", (False, True))
@pytest.mark.parametrize("op", checks.BY_HEAD)
def test_a_truth_that_does_not_fit_is_taken_of_one_head(op, backward, monkeypatch):
    spec, case = SPECS[op], {"frame_attention": "fine_coarse2", "temporal_attention": "small"}[op]
    whole = checks._truth

    def small(spec, args, outer, part):
        if part == checks.WHOLE:
            raise torch.OutOfMemoryError("too much")
        return whole(spec, args, outer, part)

    monkeypatch.setattr(checks, "_truth", small)
    args = cases.inputs(spec, case, torch.float32, CPU)
    truth = checks.truth(spec, args, backward=backward)
    assert truth.part == checks.ONE_HEAD and truth.exact[0].shape[-2] == 1
    results = gate.call(spec, gate.Job(case, "cpu", backward), args)()
    assert checks.judge(results, truth).right
    results[0][0, 0, 0, 0, 0] += 1e-2
    assert not checks.judge(results, truth).right
    whole_only = SPECS["latent_blend"]
    args = cases.inputs(whole_only, "per_frame", torch.float32, CPU)
    with pytest.raises(torch.OutOfMemoryError):
        checks.truth(whole_only, args)


def test_turns_are_a_b_b_a():
    order = []
    calls = {name: [lambda n=name, i=i: order.append(f"{n}{i}") for i in (0, 1)] for name in "AB"}
    candidates = [timing.Candidate(name, own) for name, own in calls.items()]
    times = timing.interleave(candidates, CPU, seconds=0)
    assert order[-8:] == ["A0", "A1", "B0", "B1", "B0", "B1", "A0", "A1"]
    assert [t.samples for t in times] == [2 * timing.FEWEST] * 2
    assert timing.quantiles(range(11)) == (5, 2, 8) and timing.quantiles([3]) == (3, 3, 3)


def test_peak_memory_counts_what_is_held_at_once():
    x = torch.zeros(1000)
    assert timing.peak_bytes(lambda: x + x, CPU) == 4000
    assert timing.peak_bytes(lambda: ((x + x) * x, None)[1], CPU) == 8000
    assert timing.peak_bytes(lambda: x.view(10, 100), CPU) == 0


def test_older_garbage_freed_meanwhile_does_not_count_against_a_call():
    x = torch.zeros(1000)

    def leave_garbage():  # the profiler knows what was allocated under it
        garbage = [torch.zeros(5000)]
        garbage.append(garbage)

    timing.peak_bytes(leave_garbage, CPU)
    assert timing.peak_bytes(lambda: (gc.collect(), x + x), CPU) == 4000


@pytest.mark.interpreter
def test_micro_kernels_do_what_they_count():
    pytest.importorskip("triton")
    from tvkernels.benchmarks import micro

    out = torch.empty(2 * micro.BLOCK)
    assert micro.exponentials(out, 3) == 3 * out.numel()
    expected = torch.arange(micro.BLOCK) / micro.BLOCK
    for _ in range(3):
        expected = torch.exp2(-expected)
    torch.testing.assert_close(out, expected.repeat(2))
    x = torch.randn(3, micro.BLOCK)
    assert micro.reads(x.view(-1), out, 4) == 4 * out.nbytes
    first, second = out.view(2, -1)
    torch.testing.assert_close(first, x.sum(0) + x[0])
    torch.testing.assert_close(second, x.sum(0) + x[1])


def test_report(measured, tmp_path, monkeypatch):
    for _ in range(2):
        rows = measured("frame_attention", "fine_coarse2")
    source, said = tmp_path / "ops.jsonl", []
    assert len(report.read(source)) == len(rows)  # the newest of each
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.write(source, say=said.append) == [tmp_path / "ops.md"]
    assert report.MISSING in said
    text = (tmp_path / "ops.md").read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line.startswith("| fine_coarse2 |")]
    assert len(table) == sum(row["median_s"] is not None for row in rows) >= 6
    assert all(line.count("|") == len(report.HEAD) + 1 for line in table)
    best = min(
        (row for row in rows if row["form"] == "as used" and row["median_s"]
         and row["provider"] != "cpu"), key=lambda row: row["median_s"]
    )  # fmt: skip
    assert f"cpu against {best['provider']}, the best rival as used: " in text
    assert "frame_attention, float32, forward, on cpu: " in text and "Measured on a cpu" in text
    for row in rows:
        assert row["median_s"] or f"- {row['provider']}: {row['status']}: {row['reason']}" in text


def test_picture(measured, tmp_path):
    pytest.importorskip("matplotlib")
    measured("temporal_attention", "small")
    written = report.write(tmp_path / "ops.jsonl", tmp_path / "table.md")
    assert written[1].read_bytes()[:4] == b"\x89PNG"


def test_report_of_what_is_no_result(tmp_path):
    with pytest.raises(ValueError, match="no results in"):
        report.write(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"op": 1}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: not a row"):
        report.write(tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    ("words", "reason"),
    (
        (["--op", "softmax"], "unknown op 'softmax': use one of frame_attention, "),
        (["--case", "sd15-65"], "unknown case 'sd15-65': use one of own, "),
        (["--provider", "magic"], "unknown provider 'magic': use one of triton, "),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--device", "meta"], "no measurements on 'meta'"),
        (["--dtype", "float8"], "unknown dtype 'float8': use one of bfloat16, "),
        (["--op", "latent_blend", "--backward"], "none of these ops has gradients"),
    ),
)
def test_bad_input_is_one_line(words, reason, capsys, tmp_path):
    main = pytest.importorskip("tvkernels.cli", exc_type=ImportError).main
    assert main(["bench", "ops", *words, "-o", str(tmp_path / "o.jsonl")]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1
    assert not (tmp_path / "o.jsonl").exists()


def test_command_measures_and_fails_on_a_wrong_result(capsys, tmp_path, broken):
    main = pytest.importorskip("tvkernels.cli", exc_type=ImportError).main
    file = tmp_path / "o.jsonl"
    words = ["--op", "instance_center", "--case", "small", "--device", "cpu", "--provider", "cpu"]
    assert main(["bench", "ops", *words, "-o", str(file)]) == 0
    assert "% of the limit" in capsys.readouterr().out
    assert main(["bench", "report", str(file)]) == 0 and file.with_suffix(".md").exists()
    broken("instance_center", lambda out: out + 1)
    assert main(["bench", "ops", *words, "-o", str(file)]) == 1
    assert "wrong" in capsys.readouterr().out
