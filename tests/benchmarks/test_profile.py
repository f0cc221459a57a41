"""Ranges: nothing while off, nested and balanced while on; and what `tvk profile` tells."""

import gzip
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from fresh import printed

import tvkernels
from tvkernels import FramePattern, _ranges
from tvkernels._dispatch import OPS
from tvkernels._ranges import each_step, on, span
from tvkernels.benchmarks.limits import Rates
from tvkernels.benchmarks.ops import gpu
from tvkernels.benchmarks.profiling import nsight
from tvkernels.benchmarks.profiling.counts import Counting, work
from tvkernels.ops import NAMES, specs
from tvkernels.processors import FrameAttnProcessor
from tvkernels.testing.calls import build, registered_arguments

CPU = torch.device("cpu")
RATES = Rates(copied_bytes=1e9, flops=1e9, exps=1e9, l2_bytes=None)


@pytest.fixture
def nvtx(monkeypatch):
    """A stand-in for the package: the ranges that were pushed, as (depth, kind, name, number)."""
    seen, depth = [], [0]

    def push_range(message, category, payload):
        seen.append((depth[0], category, message, payload))
        depth[0] += 1

    def pop_range():
        depth[0] -= 1

    def get_domain(name):
        assert name == "tvkernels"
        return SimpleNamespace(push_range=push_range, pop_range=pop_range)

    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(get_domain=get_domain))
    _ranges._domain.cache_clear()
    yield SimpleNamespace(seen=seen, depth=depth)
    _ranges._domain.cache_clear()
    assert depth == [0] and not _ranges.path(), "a range was left open"


def frame_attention():
    q = torch.randn(1, 2, 16, 2, 8)
    return tvkernels.frame_attention(q, q, q, FramePattern.own())


def model():
    """A layer of two linear ones."""
    return torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(3, 3)), torch.nn.Linear(3, 3))


def test_nothing_while_off(nvtx, monkeypatch):
    net = model()
    _ranges.watch(net)
    monkeypatch.setattr(_ranges, "_open", None)  # would raise
    with span("method", "tune"):
        for _ in each_step(range(2)):
            net(torch.ones(1, 3))
            frame_attention()
    assert nvtx.seen == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_off_costs_next_to_nothing():
    """Least of many: 0.2 us, where an op's whole call takes 59 on the same crowded machine."""
    import timeit

    def least(call, number):
        return min(timeit.repeat(call, number=number, repeat=50)) / number

    def ranged():
        with span("op", "frame_attention"):
            pass

    assert least(ranged, 500) < 0.05 * least(frame_attention, 5)


def test_nested_as_the_work_is(nvtx):
    net = model()
    _ranges.watch(net)
    with on(), span("method", "sample"):
        for _ in each_step("ab"):
            net(torch.ones(1, 3))
            frame_attention()
    step = [(2, "layer", "Sequential", None), (3, "layer", "0", None),
            (2, "op", "frame_attention", None)]  # fmt: skip
    assert nvtx.seen == [
        (0, "method", "sample", None), (1, "step", "step", 0), *step, (1, "step", "step", 1), *step
    ]  # fmt: skip
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_layer_that_is_added_is_seen_once(nvtx):
    net = model()
    with on():
        _ranges.watch(net)
        net.append(torch.nn.Sequential(torch.nn.Identity()))
        _ranges.watch(net)
        net(torch.ones(1, 3))
    assert [name for *_, name, _ in nvtx.seen] == ["Sequential", "0", "2"]


@pytest.mark.parametrize("where", ["layer", "op", "step"])
def test_balanced_when_something_raises(nvtx, where):
    net = model()
    _ranges.watch(net)
    q = torch.randn(1, 2, 16, 2, 8)
    with on(), span("method", "sample"):
        with pytest.raises((RuntimeError, KeyError)):
            for _ in each_step(range(2)):
                if where == "layer":
                    net(torch.ones(1, 4))  # does not fit
                elif where == "op":
                    tvkernels.frame_attention(q, q, q, FramePattern.own(), backend="cuda")
                raise KeyError(where)
        assert nvtx.depth == [1] and _ranges.path() == (("method", "sample"),)
    assert nvtx.seen[1][1] == "step"


def test_switched_on_for_a_whole_program():
    code = "from tvkernels import _ranges; print(type(_ranges.span('op', 'x')).__name__)"
    for given, kind in (("1", "_GeneratorContextManager"), ("0", "nullcontext")):
        assert printed(code, env={"TVKERNELS_NVTX": given}).strip() == kind


def test_backward_of_an_op(nvtx):
    z = torch.randn(1, 2, 3, 4, requires_grad=True)
    with on():
        tvkernels.instance_center(z).sum().backward()
    assert [name for *_, name, _ in nvtx.seen] == ["instance_center", "instance_center_backward"]


def test_compiled_in_one_graph_once(nvtx):
    """An op's range is at run time, inside the registered call; a layer's is not traced."""
    from diffusers.models.attention_processor import Attention

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layer = Attention(16, heads=2, dim_head=8, processor=FrameAttnProcessor(FramePattern.first()))
    x = torch.randn(3, 16, 16)
    plain = layer(x, num_frames=3)
    _ranges.watch(layer)
    with on():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        found = [compiled(x, num_frames=3) for _ in range(3)]
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
    assert [entry[1:3] for entry in nvtx.seen] == [("op", "frame_attention")] * 3
    torch.testing.assert_close(found[-1], plain)


def test_torch_profiler_shows_them(nvtx):
    with on(), torch.profiler.profile() as profiler, span("method", "tune"):
        frame_attention()
    (outer,) = [e for e in profiler.events() if e.name == "tvkernels/method/tune"]
    (inner,) = [e for e in profiler.events() if e.name == "tvkernels/op/frame_attention"]
    times = outer.time_range, inner.time_range
    assert times[0].start <= times[1].start < times[1].end <= times[0].end


@pytest.mark.parametrize("name", NAMES)
def test_a_registered_call_is_counted_as_its_spec_counts(name):
    spec = specs()[name]
    for case, parameters in spec.cases.items():
        if case.startswith("sd") or parameters.get("queries"):
            continue
        args = registered_arguments(spec, build(spec, case))
        found = work(OPS[name].overload, (*args, "auto"), {}, None)
        counts = (2 * spec.bytes(parameters), spec.flops(parameters), spec.exps(parameters))
        assert (found.bytes, found.flops, found.exps) == counts, case  # specs count 16 bits


def test_a_pattern_that_no_spec_names_is_not_known():
    q = torch.randn(1, 4, 16, 2, 8)
    strange = FramePattern.rows([[3], [1, 2], [0], [0, 1, 2]])
    with on(), span("method", "sample"), Counting(RATES) as counting:
        tvkernels.frame_attention(q, q, q, strange)
    (group,) = (g for (*_, name), g in counting.groups.items() if "frame" in name)
    assert group.calls == 1 and not group.known


def test_torchs_own_operators_are_counted():
    a, b = torch.randn(4, 5), torch.randn(5, 6)
    q = torch.randn(1, 2, 7, 8)
    with on(), span("method", "sample"), Counting(RATES) as counting:
        (a @ b).exp_()
        a.t().view(5, 4)
        torch.empty(9)
        torch.zeros(4).copy_(torch.ones(4))
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    found = {name.partition("::")[2]: g for (*_, name), g in counting.groups.items()}
    product = found["mm"]
    assert (product.flops, product.bytes) == (2 * 4 * 5 * 6, 4 * (4 * 5 + 5 * 6 + 4 * 6))
    assert (found["exp_"].exps, found["exp_"].bytes) == (24, 2 * 4 * 24)
    assert found["t"].bytes == found["empty"].bytes == 0
    assert found["copy_"].bytes == 2 * 4 * 4
    (attention,) = (g for name, g in found.items() if name.startswith("_scaled_dot"))
    assert (attention.flops, attention.exps) == (4 * 2 * 7 * 7 * 8, 2 * 7 * 7)
    assert product.limit_s == pytest.approx(product.bytes / 1e9)


def test_backward_is_counted_in_the_layer_that_it_belongs_to():
    net = torch.nn.ModuleDict({"a": model(), "b": model()})
    _ranges.watch(net)
    with on(), span("method", "tune"), Counting(RATES) as counting:
        net["b"](net["a"](torch.ones(2, 3))).sum().backward()
    calls = {}
    for (_, layer, name), group in counting.groups.items():
        if name == "aten::mm":
            calls[layer] = group.calls
    # Two products a linear layer, one where the input needs no gradient.
    assert calls == {"a.0": 1, "a": 2, "b.0": 2, "b": 2}


TINY = ("--frames", "2", "--size", "32")


@pytest.fixture
def tvk(capsys):
    """Runs the command: status, standard output, standard error."""
    pytest.importorskip("typer")
    from tvkernels.cli import main

    def run(*arguments) -> tuple[int, str, str]:
        status = main(["profile", *map(str, arguments)])
        return (status, *capsys.readouterr())

    return run


def check_tables(report: dict, folder) -> None:
    """What holds for every profile: it is written, adds up, and has a limit below every time."""
    assert json.loads((folder / "profile.json").read_text(encoding="utf-8")) == report
    with gzip.open(folder / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"tvkernels/method/sample", "tvkernels/op/frame_attention"} <= names
    phases = report["phases"]
    assert all(0 < row["operators_s"] <= row["seconds"] for row in phases)
    assert 0 <= report["outside_s"] < report["whole_s"]
    inside = sum(row["operators_s"] for row in phases)
    for table in ("ops", "layers"):
        seconds = [row["seconds"] for row in report[table]]
        assert sum(seconds) == pytest.approx(inside) and seconds == sorted(seconds, reverse=True)
        for count in ("bytes", "flops", "exps", "calls"):
            totals = (sum(row[count] for row in report[rows]) for rows in (table, "phases"))
            assert next(totals) == next(totals) > 0
    largest = report["largest_gap"]
    assert largest["gap_s"] == pytest.approx(largest["seconds"] - largest["limit_s"])
    assert largest["gap_s"] > 0 and largest["layer"] in {row["layer"] for row in report["layers"]}
    # Both passes made the same calls: none was timed and not counted, or counted and not timed.
    assert all(row["calls"] for row in report["ops"])
    untimed = {row["op"] for row in report["ops"] if not row["seconds"]}
    assert untimed <= {"aten::index_put"}  # which the profiler knows by what it calls


def test_profile_of_sampling_and_decoding(tvk, tmp_path):
    status, out, _ = tvk("-o", tmp_path, *TINY, "--phase", "sample", "--phase", "decode", "--json")
    report = json.loads(out)
    assert status == 0
    check_tables(report, tmp_path)
    assert [row["phase"] for row in report["phases"]] == ["sample", "decode"]
    calls = {row["op"]: row["calls"] for row in report["ops"]}
    assert calls["tvkernels::frame_attention"] == 16 and calls["tvkernels::guided_ddim_step"] == 1
    layers = {row["layer"] for row in report["layers"]}
    assert "up_blocks.1.attentions.0.transformer_blocks.0.attn1" in layers
    assert any(layer.startswith("decoder.") for layer in layers)
    assert report["largest_gap"]["phase"] in ("sample", "decode")
    assert not _ranges.path()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ei2", "blended-diffusion", "stable-video", "tcve"])
def test_profile_of_every_phase(tvk, tmp_path, method):
    status, out, err = tvk("-o", tmp_path, *TINY, "--method", method)
    assert status == 0, err
    report = json.loads((tmp_path / "profile.json").read_text(encoding="utf-8"))
    check_tables(report, tmp_path)
    assert "largest gap to the limit: " + report["largest_gap"]["op"] in out
    if method == "ei2":
        assert [row["phase"] for row in report["phases"]] == ["tune", "invert", "sample", "decode"]
        ops = [row["op"] for row in report["ops"]]
        assert "tvkernels::frame_attention_backward" in ops
        # A step of tuning belongs to layers, its backward too.
        without = next(row for row in report["layers"] if row["layer"] == "none")
        assert without["seconds"] < 0.2 * report["whole_s"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--method", "ei3"), "unknown method 'ei3': use one of ei2"),
        (("--phase", "rest"), "unknown phase 'rest': use one of tune, invert, sample, decode"),
        (("--runtime", "fast"), "unknown runtime 'fast'"),
        (("--size", "33"), "size 33: sides must be multiples of 8"),
        (("--method", "frame-by-frame", "--phase", "tune"), "no phase 'tune' of its own"),
        (("--model", "no/such/folder"), "is no folder"),
    ],
)
def test_bad_input_is_one_line(tvk, tmp_path, words, said):
    status, out, err = tvk("-o", tmp_path / "new", *words)
    assert status == 2 and not out and err.count("\n") == 1 and said in err
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tvk, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    status, _, err = tvk("-o", tmp_path / "file", *TINY)
    assert status == 2 and err.count("\n") == 1 and "is a file, not a folder" in err


def test_nsight_is_left_out_in_one_line(monkeypatch):
    assert nsight.why_not(CPU) == "it is for CUDA devices"
    monkeypatch.setenv("PATH", "/nowhere")
    assert nsight.why_not(torch.device("cuda")) == "nsys is not on PATH"


def test_nsight_runs_the_sampling_step(tmp_path, monkeypatch):
    """A stand-in for nsys that runs what it is given and writes what it was asked for."""
    fake = tmp_path / "nsys"
    fake.write_text(
        "#!/bin/sh\nfor word; do case $word in --output=*) to=${word#*=};; esac; done\n"
        'shift 7; "$@" > "$to"\n',
        encoding="utf-8",
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    plan = gpu.Plan(CPU, ["latent_blend"], 1, tmp_path, ["echo"])
    line = gpu.traced(plan)
    report = tmp_path / nsight.NAME
    assert line == f"Nsight Systems: the report is {report}"
    assert report.read_text(encoding="utf-8").split()[:3] == ["--step", "sample", "--device"]
    fake.write_text("#!/bin/sh\necho no licence >&2; exit 1\n", encoding="utf-8")
    assert gpu.traced(plan) == "Nsight Systems: no report: no licence"
    assert not report.exists()


def test_every_op_in_turn_where_diffusers_is_missing(nvtx, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    nsight.sample(CPU, ["latent_blend", "instance_center"])
    assert "every op in turn" in capsys.readouterr().out
    ops = [(2, "op", "latent_blend", None), (2, "op", "instance_center", None)]
    expected = [(0, "method", "ops", None)]
    for number in range(nsight.STEPS):
        expected += [(1, "step", "step", number), *ops]
    assert nvtx.seen == expected
