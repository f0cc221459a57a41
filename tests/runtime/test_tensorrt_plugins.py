"""TensorRT plugins of our Triton kernels: their PTX, their arguments, their registration."""

import inspect
import json
import types

import pytest
import torch
from fresh import printed

from tvkernels.runtime import plugins
from tvkernels.runtime.files import ArtifactError


def test_hidden_parameters_are_dropped_unless_they_are_read():
    ptx = ".entry f(\n.param .u64 f_param_0,\n.param .u64 f_param_1\n)\n{ ld [f_param_0]; }"
    cut = plugins.without_hidden_parameters(ptx, 1)
    assert "f_param_1" not in cut
    assert plugins.without_hidden_parameters(ptx, 2) == ptx
    with pytest.raises(ArtifactError, match="scratch"):
        plugins.without_hidden_parameters(ptx, 0)


COMPILE = """
import json, re, sys
import tvkernels.processors
from tvkernels.runtime.plugins import PLUGINS, compile_ptx
attributes = dict(frames=8, heads=8, head_dim=40, scale=0.158)
for kernel in PLUGINS:
    name, ptx, facts = compile_ptx(kernel, "sm_89", "HALF", attributes)
    head = re.search(r"\\.entry\\s+(\\w+)\\((.*?)\\n\\)", ptx, re.DOTALL)
    assert head[1] == name
    print(json.dumps([kernel, head[2].count(".param"), facts]))
"""


def test_plugins_compile_with_the_arguments_tensorrt_gives():
    pytest.importorskip("triton")
    said = printed(COMPILE, env={"TRITON_INTERPRET": None})
    rows = [json.loads(line) for line in said.splitlines()]
    assert [row[0] for row in rows] == list(plugins.PLUGINS)
    for kernel, count, facts in rows:
        plugin = plugins.PLUGINS[kernel]
        assert count == len(plugin.inputs) + len(plugin.scalars) + 1
        assert facts["rows"] >= 1
        assert facts["warps"] in (4, 8)
    with pytest.raises(ArtifactError, match="no plugins for sm_90"):
        plugins.compile_ptx("temporal_attention", "sm_90", "HALF", {})


@pytest.mark.interpreter
@pytest.mark.parametrize("pattern", ["fine_coarse", "first_previous"])
def test_the_plugins_kernels_compute_frame_attention(pattern):
    pytest.importorskip("triton")
    from tvkernels import FramePattern, frame_attention
    from tvkernels.runtime import _plugin_kernels

    coarse = pattern == "fine_coarse"
    rules = FramePattern.fine_coarse(2) if coarse else FramePattern.first_previous()
    b, f, h, w, heads, d = 2, 3, 4, 5, 2, 16
    q, k, v = (torch.randn(b, f, h * w, heads, d) for _ in range(3))
    table, out = rules.table(f), torch.full_like(q, float("nan"))
    pool = plugins.OPS["frame_attention"].backend("reference").pool
    _, constants, rows = plugins._configure(
        "frame_attention", "interpreter", "float32",
        {"frames": f, "heads": heads, "head_dim": d, "scale": d**-0.5},
    )  # fmt: skip
    grid = (-(-h * w // rows) * heads * f * b,)
    common = (q, k, v, table.row_ptr, table.segments)
    if coarse:
        pooled = [pool(x, h, w, 2) for x in (k, v)]
        numbers = (h * w, pooled[0].shape[2], h, w)
        kernel = _plugin_kernels.frame_attention_coarse
        kernel[grid](*common, *pooled, torch.empty(h, w), *numbers, out, **constants)
    else:
        _plugin_kernels.frame_attention[grid](*common, h * w, out, **constants)
    expected = frame_attention(q, k, v, rules, grid=(h, w), backend="triton")
    assert torch.equal(out, expected)


@pytest.mark.interpreter
def test_the_plugins_kernel_computes_temporal_attention():
    pytest.importorskip("triton")
    from tvkernels import temporal_attention
    from tvkernels.runtime import _plugin_kernels

    b, f, n, heads, d = 2, 5, 6, 2, 24
    q, k, v = (torch.randn(b, f, n, heads, d) for _ in range(3))
    out = torch.full_like(q, float("nan"))
    _, constants, rows = plugins._configure(
        "temporal_attention", "interpreter", "float32",
        {"frames": f, "heads": heads, "head_dim": d, "scale": d**-0.5},
    )  # fmt: skip
    grid = (-(-n * heads // rows) * b,)
    _plugin_kernels.temporal_attention[grid](q, k, v, n * heads, out, **constants)
    assert torch.equal(out, temporal_attention(q, k, v, backend="triton"))


class Number:
    """A symbolic size that writes down what is done to it."""

    def __init__(self, text):
        self.text = str(getattr(text, "text", text))

    def __mul__(self, other):
        return Number(f"({self.text}*{Number(other).text})")


class Fields:
    """Holds what is set."""

    def __init__(self, *args):
        self.items = {}

    def __setitem__(self, i, value):
        self.items[i] = value.text


def test_plugins_register_as_the_api_asks(monkeypatch):
    found = {}
    fake = types.SimpleNamespace(
        TensorDesc=type("TensorDesc", (), {}), KernelLaunchParams=type("Launch", (Fields,), {}),
        SymIntExprs=type("Exprs", (Fields,), {}), SymInt32=Number,
        cdiv=lambda a, b: Number(f"cdiv({a.text},{b})"),
        register=lambda name: lambda function: found.setdefault(name, [function]),
        aot_impl=lambda name: found[name].append,
    )  # fmt: skip
    monkeypatch.setattr(plugins, "_known", set())
    names = plugins.register(fake, "sm_89")
    assert names == list(found)
    described, implemented = found["tvkernels::FrameAttentionCoarse"]
    schema = inspect.signature(described)
    tensors = [n for n, p in schema.parameters.items() if p.annotation is fake.TensorDesc]
    assert tensors == list(plugins.PLUGINS["frame_attention_coarse"].inputs)
    assert [*schema.parameters][len(tensors) :] == list(plugins.ATTRIBUTES)
    expected = [*schema.parameters, "outputs", "tactic"]
    assert [*inspect.signature(implemented).parameters] == expected
    facts = {"warps": 4, "shared": 99, "rows": 64}
    monkeypatch.setattr(plugins, "compile_ptx", lambda *args: ("name", "ptx", facts))
    sizes = {"k_1": "bfMhd", "grid": "hw"}
    given = [
        types.SimpleNamespace(
            dtype="DataType.HALF", shape_expr=[Number(c) for c in sizes.get(name, "BFNHD")]
        )
        for name in tensors
    ]
    name, ptx, launch, scalars = implemented(*given, 8, 4, 40, 0.1, None, None)
    assert (name, ptx) == ("name", "ptx")
    assert launch.grid_x.text == "(((cdiv(N,64)*H)*F)*B)"
    assert (launch.block_x, launch.shared_mem) == (128, 99)
    assert scalars.items == {0: "N", 1: "M", 2: "h", 3: "w"}
    with pytest.raises(ArtifactError, match="no plugins for sm_90"):
        plugins.register(fake, "sm_90")


def test_the_real_bindings_take_the_plugins():
    real = pytest.importorskip("tensorrt.plugin", reason="TensorRT proper is not installed")
    assert len(plugins.register(real, "sm_89")) == 3
