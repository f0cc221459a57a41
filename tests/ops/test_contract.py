"""What every op promises torch: schema, fake, gradients, compile, export; and honest backends."""

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode

import tvkernels
from tvkernels import _native
from tvkernels._dispatch import BACKENDS, OPS, BackendError, exporting
from tvkernels.ops import specs
from tvkernels.testing.calls import RegisteredCalls, build, gradients, tensors

pytestmark = pytest.mark.usefixtures("poisoned")

SPECS = specs()
every_op = pytest.mark.parametrize("op", SPECS)
every_trained_op = pytest.mark.parametrize("op", [op for op, s in SPECS.items() if s.gradients])


def native_and(*backends):
    """(op, backend) for every op, the native backend where the op has it and it is built."""
    here = {op for op in SPECS if "native" in OPS[op].backends and not _native.why_not("cpu")}
    return [(op, b) for op in SPECS for b in ("native", *backends) if b != "native" or op in here]


def first_case(op):
    return SPECS[op].small_cases[0]


def layout_of(x):
    """Shape, dtype and the strides that mean something."""
    return x.shape, x.dtype, [s for n, s in zip(x.shape, x.stride(), strict=True) if n > 1]


def registered_call(op, backend="cpu", **make):
    """(overload, arguments) beneath the public function; what gradients reach is a leaf."""
    spec = SPECS[op]
    args = build(spec, first_case(op), **make)
    with RegisteredCalls() as seen:
        spec.call(*args[0], **args[1], backend=backend)
    [(overload, given)] = [call for call in seen.calls if call[0] is OPS[op].overload]
    given = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in given]
    for i in OPS[op].differentiable:
        if given[i] is not None:
            given[i].requires_grad_()
    return overload, given


@pytest.mark.parametrize("layout", ("dense", "permuted"))
@pytest.mark.parametrize(("op", "backend"), native_and("cpu"))
def test_opcheck(op, backend, layout):
    overload, args = registered_call(op, backend, layout=layout)
    torch.library.opcheck(overload, tuple(args))


@pytest.mark.parametrize("layout", ("dense", "permuted"))
@pytest.mark.parametrize(
    ("op", "backend"), [x for x in native_and("cpu", "reference") if SPECS[x[0]].gradients]
)
def test_backward_is_laid_out_as_its_fake_says(op, layout, backend):
    """What a compiler plans for the gradients is what the registered backward returns."""
    overload, args = registered_call(op, backend, layout=layout)
    args = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    results = tensors(overload(*args))
    backward = getattr(torch.ops.tvkernels, f"{op}_backward").default
    given = ([torch.randn_like(x) for x in results], *args)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        planned = backward(
            *torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, given)
        )
    made = backward(*given)
    assert len(planned) == len(made) > 0
    for fake, real in zip(planned, made, strict=True):
        assert layout_of(fake) == layout_of(real)
    # A compiler reuses the memory of what it gave.
    taken = {x.untyped_storage().data_ptr() for x in (*given[0], *args) if torch.is_tensor(x)}
    assert not taken & {x.untyped_storage().data_ptr() for x in made if x.numel()}


@every_trained_op
def test_second_derivatives_are_refused(op):
    """Not silently incomplete."""
    overload, args = registered_call(op, dtype=torch.float64)
    inputs = [args[i] for i in OPS[op].differentiable if args[i] is not None]
    result = tensors(overload(*args))[0]
    grads = torch.autograd.grad(
        result.square().sum(), inputs, create_graph=True, allow_unused=True
    )
    with pytest.raises(RuntimeError, match=f"{op} can be differentiated once"):
        sum(g.square().sum() for g in grads if g is not None).backward()


@every_op
def test_fake_tensors_on_a_gpu_that_is_not_there(op):
    spec = SPECS[op]
    for case in spec.small_cases:
        args = build(spec, case, torch.float16)
        expected = tensors(spec.call(*args[0], **args[1], backend="cpu"))
        args = build(spec, case, torch.float16)

        def on_gpu(x):
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

        with FakeTensorMode():
            positional, keyword = torch.utils._pytree.tree_map_only(torch.Tensor, on_gpu, args)
            results = tensors(spec.call(*positional, **keyword))
        for fake, real in zip(results, expected, strict=True):
            assert layout_of(fake) == layout_of(real), case
            assert fake.device.type == "cuda", case


@every_op
def test_compiles_whole(op):
    spec, case = SPECS[op], first_case(op)
    torch._dynamo.reset()
    compiled = torch.compile(spec.call, fullgraph=True, backend="aot_eager")
    if spec.gradients:
        results, grads = gradients(spec, build(spec, case))
        found, found_grads = gradients(spec, build(spec, case), compiled)
        torch.testing.assert_close(found_grads, grads, rtol=0, atol=0)
    else:
        args, again = build(spec, case), build(spec, case)
        results = tensors(spec.call(*args[0], **args[1]))
        found = tensors(compiled(*again[0], **again[1]))
    torch.testing.assert_close(found, results, rtol=0, atol=0)


def test_a_compilation_is_no_export():
    """Dynamo of torch 2.11 says that it is, and ops would be taken apart."""
    told = torch.compile(lambda x: (x + 1, exporting()), fullgraph=True, backend="eager")
    assert told(torch.ones(1))[1] is False


class Call(torch.nn.Module):
    """An op as a module, for torch.export: tensors come in, all else is fixed."""

    def __init__(self, op, args):
        super().__init__()
        self.call, (self.positional, self.keyword) = SPECS[op].call, args

    def forward(self, values):
        values = iter(values)
        take = lambda x: next(values) if isinstance(x, torch.Tensor) else x  # noqa: E731
        positional = [take(x) for x in self.positional]
        return self.call(*positional, **{name: take(x) for name, x in self.keyword.items()})


def exported(op):
    args = build(SPECS[op], first_case(op))
    values = tensors([*args[0], *args[1].values()])
    return torch.export.export(Call(op, args), (values,)), values


def targets(program):
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


@every_op
def test_exports_as_one_node_and_decomposes_to_aten(op):
    program, values = exported(op)
    if op not in ("frame_attention", "latent_blend"):  # these decompose while they are exported
        own = [t for t in targets(program) if t.startswith("tvkernels.")]
        assert own == [f"tvkernels.{op}.default"]
    lean = OPS[op].backend("cpu").forward
    table = torch.export.default_decompositions()
    table[OPS[op].overload] = lambda *args: lean(*args[:-1])
    program = program.run_decompositions(table)
    assert all(t.startswith(("aten.", "<built-in")) for t in targets(program)), targets(program)
    args = build(SPECS[op], first_case(op))
    expected = tensors(SPECS[op].call(*args[0], **args[1], backend="cpu"))
    torch.testing.assert_close(tensors(program.module()(values)), expected)


@pytest.mark.parametrize("case", ("own", "first_previous", "fine_coarse2", "sized_ragged"))
def test_frame_attention_exports_slices_only(case):
    """Its pattern is Python under export: neither the op nor any lookup by tensor is left."""
    spec = SPECS["frame_attention"]
    args = build(spec, case)
    program = torch.export.export(Frames(args[0][3], args[1]), tuple(args[0][:3]))
    kinds = targets(program)
    assert not [t for t in kinds if "tvkernels" in t or "index" in t or "gather" in t], kinds
    expected = spec.call(*args[0], **args[1])
    torch.testing.assert_close(program.module()(*args[0][:3]), expected)


class Frames(torch.nn.Module):
    def __init__(self, pattern, options):
        super().__init__()
        self.pattern, self.options = pattern, options

    def forward(self, q, k, v):
        return tvkernels.frame_attention(q, k, v, self.pattern, **self.options)


@every_op
def test_named_backend_never_falls_back(op, monkeypatch):
    spec = SPECS[op]
    args = build(spec, first_case(op))
    lean = OPS[op].backend("cpu")
    monkeypatch.setattr(lean, "why_not", lambda *a: ["first reason", "second reason"])
    with pytest.raises(BackendError) as error:
        spec.call(*args[0], **args[1], backend="cpu")
    assert "first reason" in str(error.value) and "second reason" in str(error.value)
    assert "reference" not in str(error.value)
    with pytest.raises(BackendError) as error:
        spec.call(*args[0], **args[1], backend="cuda")
    assert "  cuda: " in str(error.value) and "  cpu: " not in str(error.value)


@every_op
def test_backend_error_lists_every_reason(op, monkeypatch):
    spec = SPECS[op]
    args = build(spec, first_case(op))
    others = [b for b in ("native", "cpu", "reference") if b in OPS[op].backends]
    for name in others:
        reasons = [f"{name} is too old", f"{name} is too new"]
        monkeypatch.setattr(OPS[op].backend(name), "why_not", lambda *a, r=reasons: r)
    with pytest.raises(BackendError) as error:
        spec.call(*args[0], **args[1])
    for name in BACKENDS:
        assert f"  {name}: " in str(error.value)
    for name in others:
        assert f"{name} is too old" in str(error.value)
        assert f"{name} is too new" in str(error.value)


def test_auto_says_when_a_gpu_runs_without_a_kernel(monkeypatch):
    monkeypatch.setattr("tvkernels._dispatch._SAID", set())
    op = OPS["instance_center"]
    for name in ("triton", "cuda"):
        if name in op.backends:
            monkeypatch.setattr(op.backend(name), "why_not", lambda *args: ["an old ptxas"])
    with FakeTensorMode():
        z = torch.empty(1, 2, 3, 4, device="cuda")
        with pytest.warns(
            RuntimeWarning, match="instance_center runs without a kernel: triton: an"
        ):
            assert op.resolve("auto", z) is op.backend("cpu")


@every_op
def test_auto_says_when_only_the_reference_runs(op, monkeypatch):
    spec = SPECS[op]
    for name in {"native", "cpu"} & set(OPS[op].backends):
        monkeypatch.setattr(OPS[op].backend(name), "why_not", lambda *a: ["switched off"])
    monkeypatch.setattr("tvkernels._dispatch._SAID", set())
    args = build(spec, first_case(op))
    with pytest.warns(RuntimeWarning, match="cpu: switched off"):
        spec.call(*args[0], **args[1])


@every_op
def test_unknown_backend(op):
    args = build(SPECS[op], first_case(op))
    with pytest.raises(ValueError, match="unknown backend 'tpu'"):
        SPECS[op].call(*args[0], **args[1], backend="tpu")


@every_op
def test_public_docstring_names_shapes_and_source(op):
    text = SPECS[op].call.__doc__
    assert any(shape in text for shape in ("[B", "[...", "[C_out"))
    assert any(s in text for s in ("EI2", "Tune-A-Video", "BLD-AC", "lended", "DDIM", "Source"))
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in text


@every_op
def test_wrong_input_is_one_clear_error(op):
    """What has no dimensions, or no floating dtype, is refused before any backend sees it."""
    spec = SPECS[op]
    positional, keyword = build(spec, first_case(op))
    with pytest.raises(ValueError):
        spec.call(positional[0].flatten()[0], *positional[1:], **keyword)
    positional, keyword = build(spec, first_case(op))
    with pytest.raises(ValueError):
        spec.call(positional[0].to(torch.int64), *positional[1:], **keyword)


class Seen(Exception):
    """The op was called through its registration."""


class Subclass(torch.Tensor):
    """A tensor that may do anything."""


def refuse(*args):
    raise Seen


@every_op
def test_a_call_that_nothing_looks_at_goes_straight_to_its_backend(op, monkeypatch):
    spec = SPECS[op]

    def run():
        args = build(spec, first_case(op))
        with torch.no_grad():
            return tensors(spec.call(*args[0], **args[1]))

    with RegisteredCalls() as seen:
        expected = run()
    assert [call for call in seen.calls if call[0] is OPS[op].overload]
    monkeypatch.setattr(OPS[op], "overload", refuse)
    if spec.call is tvkernels.latent_blend:  # in place: autograd counts what changes
        with pytest.raises(Seen):
            run()
    else:
        assert all(map(torch.equal, run(), expected))


def attend(q):
    return tvkernels.frame_attention(q, q, q, tvkernels.FramePattern.own().table(2))


def under_profiler(q):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        attend(q)


def under_mode(q):
    with RegisteredCalls():
        attend(q)


def with_tangents(q):
    with torch.autograd.forward_ad.dual_level():
        attend(torch.autograd.forward_ad.make_dual(q, torch.ones_like(q)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "look",
    [
        lambda q: attend(q.requires_grad_()), lambda q: attend(q.to("meta")),
        lambda q: attend(torch.complex(q, q).conj().imag), under_profiler, under_mode,
        with_tangents, lambda q: torch.vmap(attend)(q[None]),
        torch.func.grad(lambda q: attend(q).sum()),
        lambda q: torch.jit.trace(attend, q), lambda q: attend(q.as_subclass(Subclass)),
    ],
    ids=(
        "gradient", "meta", "negated", "profiler", "mode", "tangent", "vmap", "grad", "trace",
        "subclass",
    ),
)  # fmt: skip
def test_what_looks_sees_a_registered_call(look, monkeypatch):
    q = torch.randn(1, 2, 4, 2, 8)
    attend(q)
    monkeypatch.setattr(OPS["frame_attention"], "overload", refuse)
    attend(q)
    with pytest.raises(Seen):
        look(q)


@every_op
def test_cases_cover_odd_sizes_and_real_ones(op):
    spec = SPECS[op]
    assert any(name.startswith("sd15-") for name in spec.cases)
    small = [build(spec, case) for case in spec.small_cases]
    assert any(x.numel() == 0 for args in small for x in tensors([*args[0], *args[1].values()]))
    for case in spec.cases.values():
        assert spec.bytes(case) >= 0 and spec.flops(case) >= 0 and spec.exps(case) >= 0


def test_new_patterns_and_frame_counts_never_recompile():
    patterns = [
        tvkernels.FramePattern.own(),
        tvkernels.FramePattern.first_previous(),
        tvkernels.FramePattern.fine_coarse(2),
    ]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(dynamic=True, fullgraph=True, backend=counter)
    def attend(q, k, v, table):
        return tvkernels.frame_attention(q, k, v, table, grid=(4, 4))

    for frames in (8, 16):
        for pattern in patterns:
            # Two clips, 8 heads and levels of 2, so that sizes coincide wherever they can.
            q, k, v = (torch.randn(2, frames, 16, 8, 40) for _ in range(3))
            for x in (q, k, v):  # the caller's own: 8 frames are not bound to be as many as heads
                torch._dynamo.mark_dynamic(x, 1)
            table = pattern.table(frames)
            expected = tvkernels.frame_attention(q, k, v, pattern, grid=(4, 4))
            torch.testing.assert_close(attend(q, k, v, table), expected, rtol=0, atol=0)
    assert counter.frame_count == 1
