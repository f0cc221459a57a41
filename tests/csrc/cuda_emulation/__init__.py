"""Builds csrc's CUDA sources for the host: every kernel runs without a GPU, its threads in turns.

The folder comes before csrc in the search for headers, so that `cuda_runtime.h`, the instructions
of tensor cores and the choice of a stream are those of the emulation. Ops are registered for CPU
tensors as `torch.ops.tvkernels_emulated.<op>`.
"""

import hashlib
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FLAGS = [
    "-O1", "-g", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror",
    "-Wno-unknown-pragmas", "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DTVK_NAMESPACE=tvkernels_emulated", "-DTVK_DEVICE=CPU",
]  # fmt: skip


def missing() -> str:
    """What keeps the emulation from being built; empty if nothing does."""
    return "" if shutil.which("g++") else "the emulation needs g++"


@cache  # one process loads one of them, whatever becomes of the sources meanwhile
def library(*options: str) -> Path:
    """The emulated library, built where its sources or options are new.

    Args:
        options: more of g++'s, for compiling and linking.
    """
    csrc = ROOT / "csrc"
    sources = [*sorted(csrc.glob("ops/*.cu")), csrc / "bindings_cuda.cpp"]
    read = [*sources, *csrc.rglob("*.cuh"), *csrc.glob("ops/*.h"), *HERE.rglob("*.*h")]
    read += csrc.glob("common/*.h")
    digest = hashlib.sha256(repr((FLAGS, options, torch.__version__)).encode())
    for path in sorted(read):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "cuda-emulation"
    folder.mkdir(parents=True, exist_ok=True)
    found = folder / f"{digest.hexdigest()[:20]}.so"
    with FileLock(folder / "lock"):  # two workers of a test run build it once
        if not found.exists():
            _build(sources, list(options), found)
    return found


def _build(sources: list[Path], options: list[str], target: Path) -> None:
    torch_folder = Path(torch.__file__).parent
    include = [f"-I{HERE}", f"-I{ROOT / 'csrc'}", "-isystem", str(torch_folder / "include")]

    def compiled(source: Path) -> str:
        out = str(target.with_suffix(f".{source.stem}.o"))
        _call(["g++", *FLAGS, *options, *include, "-x", "c++", "-c", str(source), "-o", out])
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    part = target.with_suffix(".part")
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    _call(["g++", "-shared", *options, *objects, *libraries, "-o", str(part)])
    for path in objects:
        Path(path).unlink()
    part.replace(target)


def _call(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
