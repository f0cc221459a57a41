"""Kernels without a GPU: every shipped configuration compiled, its report read, faults named.

A launch is recorded where an op would make it (fake tensors, real shapes), then compiled for
another machine's GPU as Triton would do there. The report comes from the assembled code. Attention
refuses to run on sm_90 with the ptxas of Triton 3.6 to 3.8, so that architecture is assembled by
the one that it asks for, where nvidia-cuda-nvcc is installed; TRITON_PTXAS_PATH goes before both.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from tvkernels._dispatch import OPS, Op, brings_backward
from tvkernels._triton.configs import SHARED_LIMITS
from tvkernels._triton.launch import Launch, record
from tvkernels._triton.support import interpreted, safe_ptxas, version
from tvkernels.ops import NAMES, specs
from tvkernels.testing.calls import build, registered_arguments, tensors

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
    torch.float64: "*fp64", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
    torch.uint8: "*u8",
}  # fmt: skip
# CUDA programming guide, table of technical specifications per compute capability: shared memory
# of a multiprocessor in bytes, its threads, its blocks. Each block takes 1 KB for itself.
PER_SM = {
    "sm_80": (164 * 1024, 2048, 32),
    "sm_86": (100 * 1024, 1536, 16),
    "sm_89": (100 * 1024, 1536, 24),
    "sm_90": (228 * 1024, 2048, 32),
    "sm_100": (228 * 1024, 2048, 32),
}
REGISTERS = 65536
PTXAS = "TRITON_PTXAS_PATH"
# SASS instructions by the column that counts them.
COUNTED = {
    "hgmma": r"\bHGMMA\b|\bHGMMA\.",
    "hmma": r"\bHMMA\.",
    "tcgen05": r"\bUTCHMMA|\bUTCQMMA|\bUTCOMMA",
    "mufu_ex2": r"\bMUFU\.EX2\b",
    "async_copies": r"\bLDGSTS\b|\bUTMALDG\b|\bLDGSTS\.|\bUTMALDG\.",
    "waits": r"\bWARPGROUP\.DEPBAR\b",
    "local_accesses": r"\b(?:LDL|STL)\b|\b(?:LDL|STL)\.",
}


@dataclass(frozen=True)
class Compilation:
    """One kernel as one architecture compiles it; plain data, so that workers can take it."""

    op: str
    module: str
    kernel: str
    arch: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]  # positions of arguments known to be multiples of 16
    options: tuple[tuple[str, Any], ...]
    source: str  # digest of the kernel and all that it calls

    @property
    def dtype(self) -> str:
        """Element type of the first tensor, "bf16"."""
        return next(kind[1:] for _, kind in self.signature if kind.startswith("*"))

    @property
    def config(self) -> str:
        """The element type, constants and options in one line."""
        hidden = {"enable_fp_fusion"}
        given = {name for name, kind in self.signature if kind == "constexpr"}
        shown = [(n, v) for n, v in self.constants if n.isupper() and n in given]
        shown += [(n, v) for n, v in self.options if n not in hidden]
        return " ".join([self.dtype, *(f"{n}={_short(v)}" for n, v in shown)])

    @property
    def key(self) -> str:
        """What the report depends on, hashed."""
        tools = [triton.__version__, _assembler(self.arch), sorted(COUNTED.items())]
        content = json.dumps([dataclasses.asdict(self), tools], default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:32]


def compilations(
    op: str,
    arch: str,
    dtypes: Sequence[torch.dtype] = tuple(DTYPES.values()),
    cases: Sequence[str] | None = None,
) -> list[Compilation]:
    """All that an op launches for its real cases, forward and backward, each once.

    Args:
        op: a name of `tvkernels.ops.NAMES` with a triton backend.
        arch: a name of `tvkernels._triton.configs.SHARED_LIMITS`.
        dtypes: of the inputs.
        cases: names of the op's cases; its real ones if None.
    """
    if interpreted():
        raise RuntimeError("TRITON_INTERPRET=1 turns compilation off: unset it")
    found = {}
    for dtype in dtypes:
        for launch in _launches(OPS[op], specs()[op], arch, dtype, cases):
            compilation = _compilation(op, arch, launch)
            found[compilation] = None
    return list(found)


def _launches(op: Op, spec, arch: str, dtype: torch.dtype, cases) -> Iterator[Launch]:
    module = op.backend("triton")
    for case in spec.real_cases if cases is None else cases:
        with FakeTensorMode(), record(arch) as recorder, torch.no_grad():
            args = build(spec, case, dtype)
            args = registered_arguments(spec, tree_map_only(Tensor, _on_cuda, args))
            results = module.forward(*args)
            if brings_backward(module, args):
                module.backward([torch.empty_like(x) for x in tensors([results])], *args)
        yield from recorder.launches


def _on_cuda(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")


def _compilation(op: str, arch: str, launch: Launch) -> Compilation:
    """Specialised as Triton's own launcher does it: on the number 1 and on multiples of 16."""
    kernel = launch.kernel
    signature, constants, divisible = [], dict(launch.constants), []
    for position, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature.append((name, "constexpr"))
            continue
        value = launch.arguments[name]
        fixed = type(value) is int and value == 1 and not parameter.do_not_specialize
        if value is None or fixed:
            constants[name] = value
            signature.append((name, "constexpr"))
            continue
        signature.append((name, _kind(value)))
        if not parameter.do_not_specialize and _is_divisible(value):
            divisible.append(position)
    return Compilation(
        op, kernel.fn.__module__, kernel.fn.__name__, arch, tuple(signature),
        tuple(sorted(constants.items())), tuple(divisible),
        tuple(sorted(launch.options.items())), kernel.cache_key,
    )  # fmt: skip


def _kind(value) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, bool):
        return "i1"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _is_divisible(value) -> bool:
    if isinstance(value, Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return type(value) is int and value % 16 == 0


def report(
    ops: Sequence[str] | None = None,
    archs: Sequence[str] = tuple(SHARED_LIMITS),
    *,
    dtypes: Sequence[str] = tuple(DTYPES),
    workers: int | None = None,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict]:
    """A row for every kernel, configuration and architecture.

    Args:
        ops: names; all that have a triton backend if None.
        archs: names of `SHARED_LIMITS`.
        dtypes: names of `DTYPES`, of the inputs.
        workers: processes that compile; one for each core if None.
        cache: folder of reports by content; $XDG_CACHE_HOME/tvkernels/kernels if None.
        say: shows one line of progress.
    Returns:
        Rows with "op", "kernel", "config", "arch", "dtype", "registers", "spill_bytes",
        "shared_bytes", counts of SASS instructions ("hgmma", "hmma", "tcgen05", "mufu_ex2",
        "async_copies", "waits", "local_accesses"), "blocks_per_sm", "ptxas", "faults" (a list of
        texts, empty where all is well).
    Raises:
        ValueError: unknown architecture, op or dtype.
    """
    _check_names(archs, SHARED_LIMITS, "architecture")
    _check_names(dtypes, DTYPES, "dtype")
    kernels = [name for name in NAMES if "triton" in OPS[name].backends]
    _check_names(ops or (), kernels, "op with a triton backend")
    if cache is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        cache = home / "tvkernels" / "kernels"
    types = [DTYPES[name] for name in dtypes]
    wanted = [c for a in archs for op in ops or kernels for c in compilations(op, a, types)]
    missing = [c for c in wanted if not (cache / f"{c.key}.json").exists()]
    if missing:
        say(f"{len(missing)} of {len(wanted)} kernels to compile")
        with ProcessPoolExecutor(
            min(workers or os.cpu_count() or 1, len(missing)), multiprocessing.get_context("spawn")
        ) as pool:
            for done, (c, numbers) in enumerate(
                zip(missing, pool.map(measure, missing), strict=True), 1
            ):
                _keep(cache / f"{c.key}.json", numbers)
                if done % 25 == 0:
                    say(f"{done} of {len(missing)} compiled")
    return [
        row(c, json.loads((cache / f"{c.key}.json").read_text(encoding="utf-8"))) for c in wanted
    ]


def _check_names(given, known, what: str) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}: use one of {', '.join(known)}")


def _keep(path: Path, numbers: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(numbers, file)
    os.replace(file.name, path)


def measure(c: Compilation) -> dict:
    """Compiles one kernel and reads the report of its code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(c.module), c.kernel)
    source = ASTSource(
        fn=kernel,
        signature=dict(c.signature),
        constexprs=dict(c.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in c.divisible},
    )
    target = GPUTarget("cuda", int(c.arch[3:]), 32)
    with assembler(c.arch):
        compiled = triton.compile(source, target=target, options=dict(c.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        sass = _cuobjdump("--dump-sass", file.name)
    numbers = {name: len(re.findall(pattern, sass)) for name, pattern in COUNTED.items()}
    ttgir = str(compiled.asm["ttgir"])
    in_registers = len(re.findall(r"warp_group_dot %.* : tensor<", ttgir))
    pending = len(re.findall(r"warp_group_dot_wait.*pendings = [1-9]", ttgir))
    return numbers | {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared_bytes": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        # Waits that leave products unfinished whose left operand stays in registers.
        "pending_waits": in_registers and pending,
    }


def _cuobjdump(*arguments: str) -> str:
    path = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def row(c: Compilation, numbers: dict) -> dict:
    """A row of `report` from what `measure` found."""
    spilled = numbers["stack_bytes"] if numbers["local_accesses"] else 0
    found = {"op": c.op, "kernel": c.kernel, "config": c.config, "arch": c.arch, "dtype": c.dtype}
    found |= {"spill_bytes": spilled, **numbers, "blocks_per_sm": _blocks(c.arch, numbers)}
    found["ptxas"] = _assembler(c.arch)
    return found | {"faults": faults(c, found)}


def _blocks(arch: str, numbers: dict) -> int:
    shared, threads, blocks = PER_SM[arch]
    warps = numbers["warps"]
    by_registers = REGISTERS // (-(-numbers["registers"] // 8) * 8 * 32 * warps)
    by_shared = shared // (numbers["shared_bytes"] + 1024)
    return min(by_registers, by_shared, threads // (32 * warps), blocks)


def faults(c: Compilation, row: dict) -> list[str]:
    """What makes a row red; performance limits and the known hazards of Triton's releases."""
    found = []
    if row["spill_bytes"]:
        found.append(f"spills {row['spill_bytes']} bytes of registers")
    if row["shared_bytes"] > SHARED_LIMITS[c.arch]:
        found.append(f"{row['shared_bytes']} bytes of shared memory of {SHARED_LIMITS[c.arch]}")
    if c.arch != "sm_90":
        return found
    must = c.kernel in getattr(importlib.import_module(c.module), "WGMMA", ())
    if must and c.dtype in ("fp16", "bf16") and not row["hgmma"]:
        found.append("no wgmma")
    if row["hgmma"]:
        if row["waits"] >= row["hgmma"]:
            found.append(f"wgmma serialised: {row['waits']} waits for {row['hgmma']} products")
        if row["warps"] > 4 and version(triton.__version__) < (3, 9):
            # triton issue 11047: the wait does not synchronise warp groups before 3.9.
            found.append(f"wgmma in {row['warps']} warps")
        if row["pending_waits"]:
            # triton issue 9433: several pipelined products with operands in registers.
            found.append(f"{row['pending_waits']} waits leave a product in flight")
    return found


@contextmanager
def assembler(arch: str) -> Iterator[str]:
    """Inside, Triton assembles with the ptxas that serves an architecture: its path."""
    tools = triton.knobs.nvidia
    if arch != "sm_90" or os.environ.get(PTXAS) or safe_ptxas() is None:
        yield (tools.ptxas_blackwell if int(arch[3:]) >= 100 else tools.ptxas).path
        return
    os.environ[PTXAS] = safe_ptxas()
    try:
        yield os.environ[PTXAS]
    finally:
        del os.environ[PTXAS]


@functools.cache
def _assembler(arch: str) -> str:
    """Version of the ptxas that serves an architecture."""
    with assembler(arch) as path:
        text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    return re.search(r"V([\d.]+)", text)[1]


def _short(value) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


COLUMNS = {
    "arch": "arch", "registers": "registers", "spill_bytes": "spilled B",
    "shared_bytes": "shared B", "blocks_per_sm": "blocks/SM", "hgmma": "HGMMA", "hmma": "HMMA",
    "tcgen05": "tcgen05", "mufu_ex2": "MUFU.EX2", "async_copies": "async copies",
    "waits": "waits",
}  # fmt: skip
SUMMARY = {name: COLUMNS[name] for name in COLUMNS if name not in ("arch", "waits")}


def lines(rows: Sequence[dict]) -> Iterator[str]:
    """Plain text: a line for each row, its faults below it, a count at the end."""
    for row in rows:
        numbers = ", ".join(f"{row[name]} {title}" for name, title in COLUMNS.items())
        yield f"{row['op']} {row['kernel']} {row['config']}: {numbers}"
        yield from (f"    FAULT: {fault}" for fault in row["faults"])
    red = sum(bool(row["faults"]) for row in rows)
    yield f"{len(rows)} kernels, {red} with faults"


def markdown(rows: Sequence[dict]) -> str:
    """A page: what each kernel reaches by architecture, then a table for each with every row."""
    tools = sorted({f"{row['ptxas']} for {row['arch']}" for row in rows})
    page = ["# The kernels as compiled", ""]
    page.append(
        f"Made by `tvk kernels -o docs/kernels.md` with triton {triton.__version__}, ptxas "
        f"{', '.join(tools)}. Nothing here was run: counts are of instructions in the code. "
        "Ranges are over every shipped configuration, dtype and real shape."
    )
    page += ["", *_table(["op", "kernel", "arch", "compiled", *SUMMARY.values()], _summary(rows))]
    faults = [
        f"- {row['op']} {row['kernel']} {row['config']} {row['arch']}: {fault}"
        for row in rows
        for fault in row["faults"]
    ]
    page += ["", "Faults:" if faults else "No faults.", *faults]
    for (op, kernel), group in _grouped(rows, "op", "kernel").items():
        cells = [[row["config"], *(row[name] for name in COLUMNS)] for row in group]
        page += ["", f"## {op}: `{kernel}`", ""]
        page += _table(["configuration", *COLUMNS.values()], cells)
    return "\n".join([*page, ""])


def _summary(rows: Sequence[dict]) -> Iterator[list]:
    for facts, group in _grouped(rows, "op", "kernel", "arch").items():
        ranges = [sorted({row[name] for row in group}) for name in SUMMARY]
        spans = [f"{r[0]} to {r[-1]}" if len(r) > 1 else f"{r[0]}" for r in ranges]
        yield [*facts, len(group), *spans]


def _grouped(rows: Sequence[dict], *names: str) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def _table(titles: Sequence[str], cells: Iterable[Sequence]) -> Iterator[str]:
    yield "| " + " | ".join(titles) + " |"
    yield "|" + "---|" * len(titles)
    yield from ("| " + " | ".join(map(str, line)) + " |" for line in cells)
