"""Names the packages and compiles csrc; all else that a build needs to know is in pyproject.toml.

TVKERNELS_BUILD        auto: what a compiler is there for, and a warning where it fails (default);
                       0: nothing, a wheel for every platform; 1: an error if it cannot be built
TVKERNELS_CUDA_ARCHS   "80;86;89;90;100+PTX" unless given; "" leaves the CUDA part out
TVKERNELS_LEVELS       instruction sets of the CPU part, "generic;avx2;avx512" unless given; tests
                       add "wide", 16 floats a vector on any CPU
CXX, NVCC              the compilers
CXXFLAGS               further options of CXX, for compiling and linking
MAX_JOBS               how many files are compiled at once; as many as there are processors

torch/include comes from the environment that builds: pip needs --no-build-isolation.
"""

import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
CSRC = Path("csrc")
# Top-level folders that install under the package, in wheels and editable installs alike.
MOVED = {"tvkernels.pipelines": "pipelines", "tvkernels.benchmarks": "benchmarks"}

# One binary serves torch 2.10 and newer: nothing younger is declared to the compiler.
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
NVCC_FLAGS = [
    "-O3", "-std=c++17", "-DUSE_CUDA", "-Werror", "all-warnings", "-Xptxas", "-v",
    "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra",
]  # fmt: skip
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# Every file of csrc/cpu/kernels is compiled once per level; the CPU decides which one runs. The
# order is that of csrc/cpu/common/level.h.
LEVELS = {
    "wide": ["-Wno-psabi"],  # vectors wider than the registers: passed in memory, and g++ says so
    "generic": [],
    "avx2": AVX2,
    "avx512": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
ARCHS = "80;86;89;90;100+PTX"


def torch_folder() -> Path | None:
    """The folder of the torch to build for, found without importing it."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.submodule_search_locations[0]) if spec else None


def torch_has_cuda() -> bool:
    text = (torch_folder() / "version.py").read_text(encoding="utf-8")
    return re.search(r"^cuda\b.*= *['\"]", text, re.MULTILINE) is not None


def compiler() -> list[str] | None:
    """CXX, which may be several words, with its whole path."""
    first, *others = shlex.split(os.environ.get("CXX") or "g++")
    path = shutil.which(first)
    return [path, *others] if path else None


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(os.environ.get("NVCC", "nvcc")) or shutil.which(f"{home}/bin/nvcc")


def parts() -> list[str]:
    """The parts to build, "cpu" and "cuda"; says what is missing where they were asked for."""
    wish, archs = os.environ.get("TVKERNELS_BUILD", "auto"), os.environ.get("TVKERNELS_CUDA_ARCHS")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"TVKERNELS_BUILD={wish}: use auto, 0 or 1")
    if wish == "0":
        return []
    missing = []
    if sys.platform != "linux":
        missing.append("the native part builds on Linux only")
    if compiler() is None:
        missing.append(f"no C++ compiler: {os.environ.get('CXX', 'g++')} was not found")
    if torch_folder() is None:
        missing.append("torch is not in the environment that builds: use --no-build-isolation")
    if missing and wish == "1":
        sys.exit("TVKERNELS_BUILD=1: " + "; ".join(missing))
    if missing:
        return []
    if not list(CSRC.glob("ops/*.cu")) or archs == "":
        return ["cpu"]
    if archs and wish == "1" and nvcc() is None:
        sys.exit("TVKERNELS_BUILD=1 with TVKERNELS_CUDA_ARCHS: nvcc was not found")
    # Left to itself it serves the torch that is here; one without CUDA cannot load this part.
    cuda = nvcc() is not None and (wish == "1" or torch_has_cuda())
    return ["cpu", "cuda"] if cuda else ["cpu"]


def levels() -> dict[str, list[str]]:
    """The levels to compile, those of TVKERNELS_LEVELS that this kind of processor can have."""
    asked = set(re.split(r"[;\s]+", os.environ.get("TVKERNELS_LEVELS") or "generic;avx2;avx512"))
    if "generic" not in asked or not asked <= set(LEVELS):
        sys.exit(
            f"TVKERNELS_LEVELS={';'.join(sorted(asked))}: use generic, and {', '.join(LEVELS)}"
        )
    intel = platform.machine().lower() in ("x86_64", "amd64")
    return {x: LEVELS[x] for x in LEVELS if x in asked and (intel or x in ("wide", "generic"))}


def gencode() -> list[str]:
    """nvcc's options for TVKERNELS_CUDA_ARCHS, written as torch writes its list."""
    found = []
    archs = re.split(r"[;\s]+", os.environ.get("TVKERNELS_CUDA_ARCHS") or ARCHS)
    for arch in filter(None, archs):
        number, _, ptx = arch.replace(".", "").partition("+")
        codes = [f"sm_{number}", f"compute_{number}"] if ptx == "PTX" else [f"sm_{number}"]
        found += [f"-gencode=arch=compute_{number},code=[{','.join(codes)}]"]
    return found


def compile_lines(part: str) -> list[tuple[Path, str, list[str]]]:
    """(source, name of its object, command without -c, source and -o) of every file of a part."""
    torch = str(torch_folder() / "include")
    cxx = [*compiler(), *CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    include = [f"-I{CSRC}"]
    with_torch = [*DEFINES, *include, "-isystem", torch]
    if part == "cuda":
        cuda_include = Path(nvcc()).resolve().parents[1] / "include"
        lines = [(CSRC / "bindings_cuda.cpp", "bindings", [*cxx, "-DUSE_CUDA", *with_torch])]
        if cuda_include.is_dir():
            lines[0][2].extend(["-isystem", str(cuda_include)])
        command = [nvcc(), *NVCC_FLAGS, *gencode(), *with_torch]
        return lines + [(f, f.stem, command) for f in sorted(CSRC.glob("ops/*.cu"))]
    each = " ".join(f"DO({level},__VA_ARGS__)" for level in levels())
    cxx.append(f"-DTVK_EACH_LEVEL(DO,...)={each}")
    lines = [(CSRC / "bindings_cpu.cpp", "bindings", [*cxx, *with_torch])]
    for folder in ("cpu", "cpu/common"):
        files = sorted(CSRC.glob(f"{folder}/*.cpp"))
        lines += [(f, f.stem, [*cxx, *with_torch]) for f in files]
    for level, flags in levels().items():
        command = [*cxx, *flags, f"-DTVK_LEVEL={level}", *include]  # without torch's headers
        files = sorted(CSRC.glob("cpu/kernels/*.cpp"))
        lines += [(f, f"{f.stem}.{level}", command) for f in files]
    return lines


def link_line(part: str) -> list[str]:
    libraries = [f"-L{torch_folder() / 'lib'}", "-ltorch_cpu", "-lc10"]
    if part == "cpu":
        flags = shlex.split(os.environ.get("CXXFLAGS", ""))
        # -Bsymbolic: what the library defines it also uses, whatever else a process has loaded.
        return [*compiler(), "-shared", "-Wl,-Bsymbolic", *flags, "{objects}", *libraries]
    # libtorch brings libtorch_cuda along, which a torch without CUDA does not have to link with.
    needed = ["-Xlinker", "--no-as-needed", "-ltorch"]
    return [nvcc(), "-shared", "--cudart=static", "{objects}", *needed, *libraries]


def current(target: Path, depends: Path) -> bool:
    """Whether an object is newer than every file that the compiler read for it."""
    if not target.exists() or not depends.exists():
        return False
    files = shlex.split(
        depends.read_text(encoding="utf-8").replace("\\\n", " ").partition(": ")[2]
    )
    return all(os.path.exists(f) and os.path.getmtime(f) <= target.stat().st_mtime for f in files)


class Build(build_ext):
    """Compiles csrc, a file again only where it, a header or its command has changed."""

    def get_ext_filename(self, fullname):
        """`tvkernels/_C_cpu.so`: the library does not depend on the version of Python."""
        return os.path.join(*fullname.split(".")) + ".so"

    def finalize_options(self):
        own = self.build_temp is None  # one folder for every way to build: objects are kept
        super().finalize_options()
        self.linked = set()
        if own or self.editable_mode:
            self.build_temp = os.path.join("build", "native")

    def run(self):
        folders = (self.build_lib, ROOT) if self.inplace else (self.build_lib,)
        try:
            super().run()
        finally:
            # Where a compiler fails, or a part is left out, the library of an older source must
            # not stand in for it. Until then it serves those who run.
            for folder in folders:
                for library in (Path(folder) / "tvkernels").glob("_C_*.so"):
                    if library.stem not in self.linked:
                        library.unlink()
        if self.inplace and self.extensions:
            self.write_commands()

    def copy_file(self, source, target, **how):
        """Whole or not at all: a process that has loaded the older one keeps it."""
        part = Path(target).with_suffix(f".{os.getpid()}.tmp")
        super().copy_file(source, str(part), **how)
        part.replace(target)
        return target, True

    def build_extension(self, ext):
        part = ext.name.rpartition("_")[2]
        library = Path(self.get_ext_fullpath(ext.name))
        folder = Path(self.build_temp) / part
        folder.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(lambda line: self.compile(folder, *line), compile_lines(part)))
        line, whole = link_line(part), library.with_suffix(f".{os.getpid()}.tmp")
        at = line.index("{objects}")
        self.call([*line[:at], *map(str, objects), *line[at + 1 :], "-o", str(whole)], library)
        whole.replace(library)
        self.linked.add(library.stem)

    def compile(self, folder: Path, source: Path, name: str, command: list[str]) -> Path:
        """The object of one file; beside it `.log`, what the compiler said (registers, spills)."""
        digest = hashlib.sha256(shlex.join(command).encode()).hexdigest()[:12]
        target = folder / f"{name}.{digest}.o"
        depends, part = target.with_suffix(".d"), target.with_suffix(f".{os.getpid()}.tmp")
        if not current(target, depends):
            given = ["-MMD", "-MF", str(depends), "-c", str(source), "-o", str(part)]
            said = self.call([*command, *given], source)
            target.with_suffix(".log").write_text(said, encoding="utf-8")
            part.replace(target)  # whole or not at all
        return target

    def call(self, command: list[str], what: Path) -> str:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            help = "TVKERNELS_BUILD=0 leaves csrc out, TVKERNELS_CUDA_ARCHS= its CUDA part"
            raise CompileError(f"{what} ({help}):\n{shlex.join(command)}\n{result.stderr}")
        return result.stderr

    def write_commands(self):
        entries = []
        for ext in self.extensions:
            for source, _, command in compile_lines(ext.name.rpartition("_")[2]):
                entry = {"directory": str(ROOT.resolve()), "file": str(source)}
                entries.append({**entry, "arguments": [*command, "-c", str(source)]})
        (ROOT / "compile_commands.json").write_text(
            json.dumps(entries, indent=1) + "\n", encoding="utf-8"
        )


class Wheel(bdist_wheel):
    """py3-none-<platform> where the wheel holds a library, py3-none-any where it does not."""

    def get_tag(self):
        self.root_is_pure = not any(Path(self.bdist_dir).rglob("_C_*.so"))
        return ("py3", "none", "any" if self.root_is_pure else super().get_tag()[2])


packages = find_packages(include=["tvkernels", "tvkernels.*"])
for package, folder in MOVED.items():
    packages += [package, *(f"{package}.{name}" for name in find_packages(folder))]

setup(
    packages=packages,
    package_dir=MOVED,
    ext_modules=[
        Extension(
            f"tvkernels._C_{part}",
            sources=[],
            optional=os.environ.get("TVKERNELS_BUILD", "auto") == "auto",
        )
        for part in parts()
    ],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
