"""CUDA C++ without a GPU: csrc built for GPUs that are not here, the compiler's report read.

The build is setup.py's own, of its CUDA part alone; an object is compiled again only where a file
or its command has changed. Registers, spills and shared memory are ptxas's words, instructions are
counted in the assembled code, imported symbols are held to what torch 2.10 has.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock  # comes with torch

import tvkernels
from tvkernels._triton.configs import SHARED_LIMITS

ROOT = Path(tvkernels.__file__).parents[1]
FOLDER = ROOT / "build" / "cuda-gate"
DYNAMIC = r"7DynamicILi(\d+)E"  # in a kernel's symbol: csrc/kernels/common/launch.cuh

# Runs setup.py up to its command line, leaves the CUDA part alone in it and keeps the objects.
_BUILD = """
import json, sys

import setuptools  # first: it replaces distutils
from distutils.core import run_setup

folder = sys.argv[1]
given = ["--quiet", "build_ext", f"--build-lib={folder}/lib", f"--build-temp={folder}/temp"]
found = run_setup("setup.py", given, stop_after="commandline")
found.ext_modules = [e for e in found.ext_modules if e.name.endswith("_C_cuda")]
objects = {}

class Build(found.cmdclass["build_ext"]):
    def compile(self, folder, source, name, command):
        target = super().compile(folder, source, name, command)
        objects[str(source)] = str(target)
        return target

found.cmdclass["build_ext"] = Build
found.run_commands()
print(json.dumps(objects))
"""


def why_not() -> list[str]:
    """Every reason why nothing can be built here; empty if it can."""
    reasons = []
    if not (ROOT / "csrc" / "ops").is_dir():
        reasons.append("csrc is not beside the package: the gate needs a checkout")
    for tool in (os.environ.get("NVCC", "nvcc"), os.environ.get("CXX", "g++")):
        if shutil.which(tool) is None:
            reasons.append(f"{tool} was not found")
    return reasons


def build(archs: Sequence[str], folder: Path = FOLDER) -> dict[str, Path]:
    """Builds the CUDA library for some architectures.

    Args:
        archs: names of `SHARED_LIMITS`.
        folder: keeps objects and the library, `lib/tvkernels/_C_cuda.so`.
    Returns:
        Source -> object; beside each object a `.log` of what the compiler said.
    Raises:
        RuntimeError: it does not build; the text is the compiler's.
    """
    env = {
        **os.environ,
        "TVKERNELS_BUILD": "1",
        "TVKERNELS_CUDA_ARCHS": ";".join(arch.removeprefix("sm_") for arch in archs),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # two workers of a test run build it once
        result = subprocess.run(
            [sys.executable, "-c", _BUILD, str(folder)],
            cwd=ROOT, env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if result.returncode:
        raise RuntimeError(result.stdout + result.stderr)
    return {source: Path(o) for source, o in json.loads(result.stdout.splitlines()[-1]).items()}


def report(archs: Sequence[str] = tuple(SHARED_LIMITS), folder: Path = FOLDER) -> list[dict]:
    """A row for every kernel and architecture.

    Returns:
        Rows with "op" (the file in csrc/ops), "kernel" (its name and template arguments), "arch",
        "registers", "spill_bytes", "stack_bytes", "shared_bytes" (with the most that a launch
        adds), "hmma" (matrix instructions), "wide_reads", "wide_writes" (16-byte accesses of
        global memory) and "faults". Of a kernel for several sizes of shared memory, those that
        the architecture has.
    Raises:
        ValueError: unknown architecture.
        RuntimeError: csrc does not build.
    """
    for arch in archs:
        if arch not in SHARED_LIMITS:
            raise ValueError(
                f"unknown architecture {arch!r}: use one of {', '.join(SHARED_LIMITS)}"
            )
    rows = []
    for source, target in build(archs, folder).items():
        if not source.endswith(".cu"):
            continue
        said = target.with_suffix(".log").read_text(encoding="utf-8")
        counts = {arch: _instructions(target, arch) for arch in archs}
        for row in launched(list(read_log(said))):
            row = {"op": Path(source).stem, **row, **counts[row["arch"]].get(row["symbol"], {})}
            rows.append(row | {"faults": faults(row) + warnings(said)})
    names = _demangled([row.pop("symbol") for row in rows])
    for row, name in zip(rows, names, strict=True):
        row["kernel"] = re.sub(r"^(?:void )?(?:\w+::|\(anonymous namespace\)::)*|\(.*", "", name)
    return rows


def read_log(text: str) -> Iterator[dict]:
    """What `ptxas -v` says of each kernel: symbol, architecture and numbers."""
    number = {
        "registers": r"Used (\d+) registers",
        "stack_bytes": r"(\d+) bytes stack frame",
        "shared_bytes": r"(\d+) bytes smem",
    }
    # One paragraph for each kernel, from "Compiling entry function" to the next.
    head = r"Compiling entry function '(\w+)' for '(sm_\d+)a?'"
    parts = re.split(head, text)[1:]
    for symbol, arch, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        found = {name: re.search(pattern, body) for name, pattern in number.items()}
        dynamic = re.search(DYNAMIC, symbol)
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", body)
        row = {
            "symbol": symbol,
            "arch": arch,
            **{name: int(match[1]) if match else 0 for name, match in found.items()},
            "spill_bytes": sum(map(int, spills)),
        }
        row["shared_bytes"] += int(dynamic[1]) if dynamic else 0
        yield row


def launched(rows: Sequence[dict]) -> list[dict]:
    """The rows of kernels that a launcher can take: all where no size of shared memory fits."""

    def kernel(row):
        return row["arch"], re.split(r"I\w*" + DYNAMIC, row["symbol"])[0]

    fits = [row["shared_bytes"] <= SHARED_LIMITS[row["arch"]] for row in rows]
    served = {kernel(row) for row, fit in zip(rows, fits, strict=True) if fit}
    return [row for row, fit in zip(rows, fits, strict=True) if fit or kernel(row) not in served]


def faults(row: dict) -> list[str]:
    """What makes a row red."""
    found = []
    if row["registers"] == 0:
        found.append("the compiler reported no registers")
    if row["spill_bytes"] or row["stack_bytes"]:
        found.append(f"spills {row['spill_bytes']} bytes, keeps {row['stack_bytes']} on a stack")
    if row["shared_bytes"] > SHARED_LIMITS[row["arch"]]:
        found.append(f"{row['shared_bytes']} bytes of shared memory")
    expected = row.get("hmma") is not None
    if expected and "attend_kernel" in row["symbol"] and not row["hmma"]:
        found.append("no matrix instruction")
    # Template arguments as the compiler mangles them: runs of 8, a head dim, or stages of weights.
    if expected and re.search(r"Li(?:8|40|80|160)EEE|" + DYNAMIC, row["symbol"]):
        if not row["wide_reads"]:
            found.append("no 16-byte read")
        if not row["wide_writes"] and "partial" not in row["symbol"]:
            found.append("no 16-byte write")
    return found


def warnings(said: str) -> list[str]:
    """Lines of a compiler that warn."""
    return [line.strip() for line in said.splitlines() if "warning" in line.lower()]


def _instructions(target: Path, arch: str) -> dict[str, dict[str, int]]:
    """Symbol -> counts of instructions; empty where there is no cuobjdump."""
    tool = shutil.which("cuobjdump") or _tool_of_triton()
    if tool is None:
        return {}
    sass = subprocess.run(
        [tool, "--dump-sass", "-arch", arch, str(target)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    patterns = {
        "hmma": r"\bHMMA\.",
        "wide_reads": r"\bLDG(?:STS)?\.\S*\b128\b",
        "wide_writes": r"\bSTG\.\S*\b128\b",
    }
    parts = re.split(r"Function : (\w+)", sass)[1:]
    return {
        symbol: {name: len(re.findall(pattern, body)) for name, pattern in patterns.items()}
        for symbol, body in zip(parts[::2], parts[1::2], strict=True)
    }


def _tool_of_triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.knobs.nvidia.cuobjdump.path


def _demangled(symbols: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if tool is None:
        return symbols
    text = "\n".join(symbols)
    result = subprocess.run([tool], input=text, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def torch_headers() -> Path:
    """The headers of the torch that runs."""
    import torch

    return Path(torch.__file__).parent / "include"


def shims(include: Path) -> set[str]:
    """Functions of torch's stable C interface as it was in 2.10, read from headers.

    Args:
        include: torch's folder of headers.
    """
    text = subprocess.run(
        [os.environ.get("CXX", "g++"), "-E", "-P", "-x", "c++", "-std=c++17", "-DUSE_CUDA",
         "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{include}", "-"],
        input="#include <torch/csrc/stable/c/shim.h>\n",
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", text))


def strangers(library: Path, known: set[str]) -> list[str]:
    """Symbols that a library takes from torch or Python beyond the stable interface.

    Args:
        known: what `shims` gives.
    """
    result = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    )
    symbols = [line.split()[-1].partition("@")[0] for line in result.stdout.splitlines()]
    foreign = re.compile(r"(?:aoti_)?torch_|_?Py[A-Z_]|_Z\w*(?:2at|3c10|5torch|8pybind11)\w")
    return sorted(s for s in symbols if foreign.match(s) and s not in known)


COLUMNS = {
    "registers": "registers", "spill_bytes": "spilled B", "shared_bytes": "shared B",
    "hmma": "HMMA", "wide_reads": "16 B reads", "wide_writes": "16 B writes",
}  # fmt: skip


def lines(rows: Sequence[dict]) -> Iterator[str]:
    """Plain text: a line for each row, its faults below it, a count at the end."""
    for row in rows:
        numbers = ", ".join(f"{row.get(name, '?')} {title}" for name, title in COLUMNS.items())
        yield f"{row['arch']} {row['op']} {row['kernel']}: {numbers}"
        yield from (f"    FAULT: {fault}" for fault in row["faults"])
    red = sum(bool(row["faults"]) for row in rows)
    yield f"{len(rows)} kernels, {red} with faults"


def main(archs: Sequence[str]) -> int:
    """`python -m tvkernels.testing.cuda_kernels [sm_80 ...]`: the report; 1 where it is red."""
    missing = why_not()
    if missing:
        print("; ".join(missing), file=sys.stderr)
        return 2
    rows = report(archs or tuple(SHARED_LIMITS))
    print("\n".join(lines(rows)))
    return int(any(row["faults"] for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
