"""frame_attention and temporal_attention as ahead-of-time TensorRT plugins of our Triton kernels.

A plugin is a node in the ONNX file, emitted where another export decomposes the op, and a PTX that
TensorRT keeps in the engine, so that running it needs neither Python nor Triton. Unproven: the
nodes, the PTX and the registration are tested, but TensorRT proper has never built one here. The
stated alternative is the decomposed graph. See `tensorrt.plugin` in TensorRT's documentation:
arguments are inputs, then scalars, then outputs.
"""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from tvkernels._dispatch import OPS
from tvkernels._inflate import InflatedHandle
from tvkernels._triton.configs import choose, next_power_of_2
from tvkernels.runtime.files import ArtifactError
from tvkernels.runtime.program import Shape, decompositions, export_program

DOMAIN = "tvkernels"
ONE_PASS = 32  # frames that the kernel over time holds at once
NARROWEST = 16
DTYPES = {"HALF": ("fp16", "float16"), "FLOAT": ("fp32", "float32")}
# ptxas before 13.3 miscompiles attention on sm_90, and which one TensorRT carries cannot be told.
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_100", "sm_120")
ATTRIBUTES = {"frames": int, "heads": int, "head_dim": int, "scale": float}


@dataclass(frozen=True)
class Plugin:
    """One plugin.

    Args:
        name: of the node.
        kernel: in `_plugin_kernels`.
        inputs: tensors, in order.
        scalars: of the kernel, in order.
    """

    name: str
    kernel: str
    inputs: tuple[str, ...]
    scalars: tuple[str, ...]


PLUGINS = {
    plugin.kernel: plugin
    for plugin in (
        Plugin("TemporalAttention", "temporal_attention", ("q", "k", "v"), ("cells",)),
        Plugin(
            "FrameAttention", "frame_attention", ("q", "k", "v", "row_ptr", "segments"),
            ("tokens",),
        ),
        Plugin(
            "FrameAttentionCoarse", "frame_attention_coarse",
            ("q", "k", "v", "row_ptr", "segments", "k_1", "v_1", "grid"),
            ("tokens", "tokens_1", "h", "w"),
        ),
    )
}  # fmt: skip


def trace(
    handle: InflatedHandle, shape: Shape, dynamic_size: bool, plugins: bool
) -> torch.export.ExportedProgram:
    """`program.export_program`, and where wanted with plugin nodes in it."""
    program = export_program(handle, shape, dynamic_size=dynamic_size, keep_ops=plugins)
    return program.run_decompositions(decompositions_with_plugins()) if plugins else program


def decompositions_with_plugins() -> dict:
    """Those of `program.decompositions`, attention by plugin nodes where a plugin serves."""
    return decompositions() | {
        OPS["temporal_attention"].overload: _temporal,
        OPS["frame_attention"].overload: _frame,
    }


def _node(kernel: str, tensors, q: Tensor, scale: float | None) -> Tensor:
    """The op of a plugin, as an operator of our own domain."""
    frames, _, heads, head_dim = q.shape[1:]
    attributes = {
        "frames": frames, "heads": heads, "head_dim": head_dim,
        "scale": head_dim**-0.5 if scale is None else scale,
        "plugin_namespace": DOMAIN, "plugin_version": "1", "aot": 1,
    }  # fmt: skip
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{PLUGINS[kernel].name}", [x.contiguous() for x in tensors], attributes,
        dtype=q.dtype, shape=q.shape, version=1,
    )  # fmt: skip


def _temporal(q, k, v, scale, backend):
    if q.shape[1] > ONE_PASS:
        return OPS["temporal_attention"].backend("cpu").forward(q, k, v, scale)
    return _node("temporal_attention", (q, k, v), q, scale)


def _frame(q, k, v, row_ptr, segments, levels, h, w, scale, return_lse, backend):
    used = [level for level in levels if level]
    if return_lse or len(used) > 1 or q.shape[1] != k.shape[1]:
        raise ArtifactError("a plugin serves one coarse level, without a log-sum-exp")
    nothing = q.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32))
    common = (q, k, v, row_ptr, segments)
    if not used:
        return _node("frame_attention", common, q, scale), nothing
    pool = OPS["frame_attention"].backend("reference").pool
    pooled = [pool(x, h, w, used[0]) for x in (k, v)]
    # A tensor of this shape tells the kernel the picture's sides: plugins see shapes alone.
    grid = q.new_zeros(()).expand(h, w)
    return _node("frame_attention_coarse", (*common, *pooled, grid), q, scale), nothing


def compile_ptx(kernel: str, arch: str, dtype: str, attributes: dict) -> tuple[str, str, dict]:
    """A plugin's kernel for an architecture.

    Args:
        kernel: a key of `PLUGINS`.
        dtype: a key of `DTYPES`.
        attributes: of `ATTRIBUTES`.
    Returns:
        The kernel's name, its PTX with no other parameters than the plugin's, and "warps",
        "shared" (bytes) and "rows" (tokens or cells that one program serves).
    Raises:
        ArtifactError: no plugin for this architecture or dtype, or Triton is missing.
    """
    if arch not in ARCHITECTURES:
        raise ArtifactError(
            f"no plugins for {arch}: use {', '.join(ARCHITECTURES)}, or leave out --plugins"
        )
    try:
        import triton
        from triton.backends.compiler import GPUTarget

        from tvkernels.runtime import _plugin_kernels
    except ImportError as error:
        raise ArtifactError(f"plugins are compiled by Triton, which is missing: {error}") from None
    plugin, (pointer, name) = PLUGINS[kernel], DTYPES[dtype]
    config, constants, rows = _configure(kernel, arch, name, attributes)
    options = {key: config.pop(key) for key in ("num_warps", "num_stages") if key in config}
    pointers = dict.fromkeys((*plugin.inputs, "out"), f"*{pointer}")
    pointers |= dict.fromkeys(("row_ptr", "segments"), "*i32")
    function = getattr(_plugin_kernels, kernel)
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32")
        for name in function.arg_names
    }
    aligned = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    source = triton.compiler.ASTSource(
        fn=function, signature=signature, constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )  # fmt: skip
    target = GPUTarget("cuda", int(arch[3:]), 32)
    compiled = triton.compile(source, target=target, options={**options, "enable_fp_fusion": True})
    given = sum(kind != "constexpr" for kind in signature.values())
    ptx = without_hidden_parameters(compiled.asm["ptx"], given)
    facts = {"warps": compiled.metadata.num_warps, "shared": compiled.metadata.shared}
    return compiled.metadata.name, ptx, {**facts, "rows": rows}


def _configure(kernel: str, arch: str, dtype: str, attributes: dict):

    from tvkernels._triton.maths import split

    d, frames, scale = (attributes[name] for name in ("head_dim", "frames", "scale"))
    constants = {"NUM": frames, "HEADS": attributes["heads"], "SCALE": scale}
    align = math.gcd(16 // (2 if dtype == "float16" else 4), d)
    facts = {"arch": "sm_89" if arch == "sm_120" else arch, "dtype": dtype, "head_dim": d}
    if kernel == "temporal_attention":
        held = ONE_PASS if frames > NARROWEST else NARROWEST
        config = choose("temporal_attention", "_attend", **facts, frames=held)
        tail = max(NARROWEST, next_power_of_2(d % config["CHUNK"]))
        constants |= {"FRAMES": held, "HEAD_DIM": d, "TAIL": tail, "ALIGN": align}
        constants |= {name: config[name] for name in ("CELLS", "CHUNK")}
        return config, constants, config["CELLS"]
    config = choose("frame_attention", "_attend", **facts, even=False)
    d1, d2 = split(d)
    padded = config.pop("PAD_QK")
    constants |= {
        "SCALE": scale / math.log(2), "D": d, "D1": d1, "D2": d2, "ALIGN": align,
        "QK1": next_power_of_2(d1 + d2) if padded else d1, "QK2": 0 if padded else d2,
        "BM": config["BM"], "BN": config["BN"], "EMULATE": config["EMULATE"],
    }  # fmt: skip
    return config, constants, config["BM"]


def without_hidden_parameters(ptx: str, given: int) -> str:
    """A PTX without the scratch pointers that Triton adds and TensorRT would not pass.

    Raises:
        ArtifactError: the kernel reads one of them.
    """
    head = re.search(r"(\.entry\s+\w+\()(.*?)(\n\))", ptx, re.DOTALL)
    parameters = [line for line in head[2].split(",") if line.strip()]
    for line in parameters[given:]:
        name = line.split()[-1]
        if len(re.findall(rf"\b{name}\b", ptx)) > 1:
            raise ArtifactError(f"the kernel needs scratch memory ({name}): use the plain graph")
    return ptx[: head.start(2)] + ",".join(parameters[:given]) + ptx[head.end(2) :]


def register(trtp: ModuleType, arch: str) -> list[str]:
    """Tells TensorRT of the plugins, compiled for an architecture when a network needs them.

    Args:
        trtp: `tensorrt.plugin`.
    Returns:
        Their names.
    """
    if arch not in ARCHITECTURES:
        raise ArtifactError(f"no plugins for {arch}: use one of {', '.join(ARCHITECTURES)}")
    _target[0] = arch
    for plugin in PLUGINS.values():
        if plugin.name not in _known:
            _register(trtp, plugin)
            _known.add(plugin.name)
    return [f"{DOMAIN}::{plugin.name}" for plugin in PLUGINS.values()]


_known: set[str] = set()
_target = [""]  # the architecture of the build under way


def _register(trtp: ModuleType, plugin: Plugin) -> None:
    def describe(*inputs, **attributes):
        return inputs[0].like()

    def implement(*given):
        count = len(plugin.inputs)
        tensors = dict(zip(plugin.inputs, given[:count], strict=True))
        attributes = dict(zip(ATTRIBUTES, given[count : count + len(ATTRIBUTES)], strict=True))
        q = tensors["q"]
        name, ptx, facts = compile_ptx(
            plugin.kernel, _target[0], str(q.dtype).rpartition(".")[2].upper(), attributes
        )
        batch, frames, tokens, heads = (q.shape_expr[i] for i in range(4))
        sizes = {"tokens": tokens, "cells": tokens * heads}
        if "grid" in tensors:
            sizes["tokens_1"] = tensors["k_1"].shape_expr[2]
            sizes["h"], sizes["w"] = (tensors["grid"].shape_expr[i] for i in range(2))
        launch = trtp.KernelLaunchParams()
        if plugin.kernel == "temporal_attention":
            launch.grid_x = trtp.cdiv(sizes["cells"], facts["rows"]) * batch
        else:
            launch.grid_x = trtp.cdiv(tokens, facts["rows"]) * heads * frames * batch
        launch.block_x, launch.shared_mem = facts["warps"] * 32, facts["shared"]
        scalars = trtp.SymIntExprs(len(plugin.scalars))
        for i, scalar in enumerate(plugin.scalars):
            scalars[i] = trtp.SymInt32(sizes[scalar])
        return name, ptx, launch, scalars

    full = f"{DOMAIN}::{plugin.name}"
    kinds = dict.fromkeys(plugin.inputs, trtp.TensorDesc) | ATTRIBUTES
    text = str | bytes
    result = tuple[text, text, trtp.KernelLaunchParams, trtp.SymIntExprs]
    describe.__signature__ = _signature(kinds, tuple[trtp.TensorDesc])
    names = dict.fromkeys((*kinds, "outputs", "tactic"), inspect.Parameter.empty)
    implement.__signature__ = _signature(names, result)
    trtp.register(full)(describe)
    trtp.aot_impl(full)(implement)


def _signature(kinds: dict, result) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [inspect.Parameter(name, kind, annotation=given) for name, given in kinds.items()],
        return_annotation=result,
    )
