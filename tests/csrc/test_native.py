"""The native libraries: how they build, what they import, when they load, and that they are right.

Results at the best level of this CPU are tests/ops/test_ops.py's; here are the other levels,
random calls and calls where tails begin, and the same under the address and undefined-behaviour
sanitizers.
"""

import math
import os
import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import native_fuzz
import pytest
import torch

import tvkernels
from tvkernels import BackendError, _native, info
from tvkernels._dispatch import OPS
from tvkernels.ops import specs
from tvkernels.testing import cuda_kernels
from tvkernels.testing.calls import build, registered_arguments

ROOT = Path(__file__).parents[2]
built = pytest.mark.skipif(bool(_native.why_not("cpu")), reason="; ".join(_native.why_not("cpu")))
compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="needs g++ on Linux"
)
NATIVE = [op for op in OPS if "native" in OPS[op].backends]
LEVELS = ("wide", "generic", "avx2", "avx512")
# Of this CPU, whatever TVKERNELS_CPU_LEVEL makes of it.
BEST = {"AVX2": "avx2", "AVX512": "avx512"}.get(torch.backends.cpu.get_cpu_capability(), "generic")
SMALL = (torch.randn(1, 2, 3, 2, 8),) * 3


def run(*command, **environment):
    # Threads that wait by turning take busy cores from each other: 162 s of a fuzz against 20.
    given = {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | given | environment,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


@built
@compiler
def test_one_binary_for_torch_2_10_and_newer():
    """All it takes from elsewhere is C, C++'s own library and the stable ABI's list of 2.10."""
    allowed = cuda_kernels.shims(cuda_kernels.torch_headers())
    assert "torch_parallel_for" in allowed and "torch_from_blob" not in allowed  # 2.10's; 2.11's
    for library in _native.FOLDER.glob("_C_*.so"):
        wanted = run("nm", "-DC", "--undefined-only", str(library)).splitlines()
        names = [line.split(maxsplit=1)[1] for line in wanted]
        own = r"std::|operator (new|delete)|(typeinfo|vtable) for (std|__cxxabiv1)::|_ITM_|__gmon_"
        versioned = r"@(GLIBC|GLIBCXX|CXXABI|GCC)_"
        stable = {n for n in names if not re.match(own, n) and not re.search(versioned, n)}
        assert "torch_library_impl" in stable
        assert stable <= allowed, f"{library.name} imports {sorted(stable - allowed)}"


@built
@compiler
def test_kernels_of_one_level_stay_there():
    """A function that two levels share would be the linker's choice, AVX-512 on any CPU."""
    objects = sorted((ROOT / "build" / "native" / "cpu").glob("*.o"), key=os.path.getmtime)
    # The newest of each name: older ones were compiled with other flags.
    newest = {o.name.rpartition(".")[0].rpartition(".")[0]: o for o in objects}
    leveled = [o for name, o in newest.items() if re.search(r"\.(generic|avx2|avx512)$", name)]
    if not leveled:
        pytest.skip("built elsewhere: no objects in build/native")
    for file in leveled:
        level = file.name.split(".")[1]
        for line in run("nm", "-C", "--defined-only", str(file)).splitlines():
            _, kind, name = line.split(maxsplit=2)
            assert kind not in "WVu", f"{file.name} shares {name}"
            assert kind != "T" or f"tvk::{level}::" in name, f"{file.name} defines {name}"


def test_import_loads_no_library():
    loaded = run(
        sys.executable,
        "-c",
        "import tvkernels.ops.temporal_attention.native; print(open('/proc/self/maps').read())",
    )
    assert "_C_cpu" not in loaded and "libtorch_cpu" in loaded


def test_a_missing_library_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(_native, "FOLDER", tmp_path)
    with pytest.raises(BackendError, match="make native") as error:
        tvkernels.temporal_attention(*SMALL, backend="native")
    assert "TVKERNELS_BUILD=1" in str(error.value) and "_C_cpu.so" in str(error.value)
    assert "make native" in info.report()["versions"]["native, CPU"]
    assert "make native" in info.report()["ops"]["temporal_attention"]["backends"]["native"][0]
    with pytest.raises(RuntimeError, match="make native"):
        _native.load("cpu")
    # auto goes on without a word: composed PyTorch gives the same result.
    result = tvkernels.temporal_attention(*SMALL)
    assert torch.equal(result, tvkernels.temporal_attention(*SMALL, backend="cpu"))


def test_a_library_that_does_not_load_is_said(monkeypatch, tmp_path):
    (tmp_path / "_C_cpu.so").write_bytes(b"of another machine")
    monkeypatch.setattr(_native, "FOLDER", tmp_path)
    (reason,) = _native.why_not("cpu")
    assert "another machine or torch" in reason and "make native" in reason


@built
def test_a_library_without_an_op_is_said():
    (reason,) = _native.why_not("cpu", "an_op_of_tomorrow")
    assert "built without an_op_of_tomorrow" in reason and "make native" in reason


def test_what_a_cpu_op_refuses():
    x = torch.zeros(2)
    assert any("CPU tensors, got meta" in r for r in _native.refuse("any", x.to("meta")))
    assert any("float64" in r for r in _native.refuse("any", x.double(), None))
    assert any("one dtype" in r for r in _native.refuse("any", x, x.half()))


@built
@pytest.mark.parametrize("op", NATIVE)
def test_auto_takes_it(op):
    """And hands float64, which it does not compute, to composed PyTorch."""
    spec = specs()[op]
    for dtype, name in ((torch.float32, "native"), (torch.float64, "cpu")):
        args = registered_arguments(spec, build(spec, spec.small_cases[0], dtype))
        module = OPS[op].resolve("auto", *args)
        assert module.__name__ == f"tvkernels.ops.{op}.{name}", module


@built
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("op", NATIVE)
def test_random_calls(op):
    for seed in range(15):
        native_fuzz.check(op, 1000 + seed)


@built
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("op", native_fuzz.EDGES)
def test_calls_where_tails_begin(op):
    for seed, edge in native_fuzz.edges(op, every=4):
        native_fuzz.check(op, seed, edge)


def test_a_tail_begins_in_every_vector():
    """Of a norm's block of 64 positions, whatever the level's width, in every dtype."""
    found = {
        (math.prod(edge["shape"][3:]) % 64 // width, width, seed % len(native_fuzz.DTYPES))
        for seed, edge in native_fuzz.edges("temporal_conv")
        for width in (4, 8, 16)
        if math.prod(edge["shape"][3:]) % width
    }
    assert len(found) == (16 + 8 + 4) * 3


@built
@pytest.mark.parametrize("positions", (1, 17, 33, 63))
def test_positions_beyond_the_plane_have_no_share_in_gradients(positions):
    """Their variance of nothing would be divided by, where eps is 0."""
    generator = torch.Generator().manual_seed(positions)
    x, grad = torch.randn(2, 1, 3, 4, 1, positions, generator=generator)
    scale, shift = torch.randn(2, 4, generator=generator)

    def gradients(backend, dtype):
        given = [t.to(dtype).requires_grad_() for t in (x, scale, shift)]
        taps = torch.eye(4, dtype=dtype)[..., None]
        options = {"norm_weight": given[1], "norm_bias": given[2], "groups": 2, "eps": 0.0}
        result = tvkernels.temporal_conv(given[0], taps, **options, backend=backend)
        return torch.autograd.grad(result, given, grad.to(dtype))

    both = gradients("native", x.dtype), gradients("reference", torch.float64)
    for found, expected in zip(*both, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@built
def test_numbers_beyond_a_run_have_no_share_in_gradients():
    """A zero there, normalised by a large mean and a small spread, would be infinite."""
    x = torch.full((1, 2, 2, 1, 2), 2.0**116)  # sums of it are exact: every number becomes shift
    scale, shift = torch.full((2,), 30.0), torch.tensor((0.5, -1.0))
    given = [t.requires_grad_() for t in (scale, shift)]
    result = tvkernels.clip_group_norm(x, *given, 1, silu=True, backend="native")
    found = torch.autograd.grad(result.sum(), given)
    (slope,) = torch.autograd.grad(torch.nn.functional.silu(shift).sum(), shift)
    assert torch.equal(found[0], torch.zeros(2))
    torch.testing.assert_close(found[1], 4 * slope)


@compiler
def test_a_count_that_no_vector_has_ends_the_program(tmp_path):
    """As it does in the sanitizers' build, at 16 floats a vector on any CPU."""
    program = str(tmp_path / "counts")
    source = ["-std=c++17", "-Icsrc", "-DTVK_LEVEL=wide", "-DTVK_CHECKED", "-Wno-psabi"]
    run("g++", *source, "tests/csrc/counts.cpp", "-o", program)
    for count in (0, 1, 16):
        run(program, str(count))
    for count in (-1, -64, 17):
        with pytest.raises(
            AssertionError, match=rf"vec\.h:\d+: {count} numbers of a vector of 16"
        ):
            run(program, str(count))


@compiler
def test_exp_is_within_one_ulp(tmp_path):
    program = str(tmp_path / "exp_ulps")
    source = ["-O2", "-std=c++17", "-Icsrc", "-DTVK_LEVEL=generic", "tests/csrc/exp_ulps.cpp"]
    run("g++", *source, "-o", program)
    assert float(run(program)) < 1  # a line more than the error is no number


@built
def test_halves_are_rounded_as_torch_rounds_them():
    native_fuzz.check_rounding()


@built
@pytest.mark.parametrize("level", ("generic", "avx2"))
def test_other_levels(level):
    """One process each: the level is chosen once."""
    fuzz = ("tests/csrc/native_fuzz.py", str(_native.FOLDER), "3", "--every", "4")
    said = run(sys.executable, *fuzz, TVKERNELS_CPU_LEVEL=level)
    assert said.rstrip().endswith(f"level {min(level, BEST, key=LEVELS.index)}")


@built
def test_a_level_that_does_not_exist_is_an_error():
    code = "from tvkernels import _native; _native.load('cpu').level()"
    with pytest.raises(AssertionError, match="use generic, avx2 or avx512"):
        run(sys.executable, "-c", code, TVKERNELS_CPU_LEVEL="sse9")


def setup(*arguments, **environment):
    return run(sys.executable, "setup.py", "--quiet", *arguments, **environment)


def wheel(folder, **environment):
    dirs = ["build", "--build-lib", str(folder / "lib"), "bdist_wheel", "--dist-dir", str(folder)]
    setup(*dirs, "--bdist-dir", str(folder / "bdist"), **environment)
    (found,) = folder.glob("*.whl")
    return found.name, zipfile.ZipFile(found).namelist()


def test_a_wheel_without_a_library_is_for_every_platform(tmp_path):
    name, files = wheel(tmp_path, TVKERNELS_BUILD="0")
    assert name.endswith("-py3-none-any.whl")
    assert not [f for f in files if f.endswith(".so")]


@built
@compiler
def test_a_wheel_with_a_library_is_for_this_platform_and_every_python(tmp_path):
    name, files = wheel(tmp_path, TVKERNELS_BUILD="1", TVKERNELS_CUDA_ARCHS="")
    assert re.search(r"-py3-none-linux_\w+\.whl$", name), name
    assert [f for f in files if f.endswith(".so")] == ["tvkernels/_C_cpu.so"]


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"TVKERNELS_BUILD": "maybe"}, "use auto, 0 or 1"),
        ({"TVKERNELS_BUILD": "1", "CXX": "no-such-compiler"}, "no-such-compiler was not"),
    ],
)
def test_a_build_that_cannot_be_is_one_clear_line(environment, text):
    with pytest.raises(AssertionError, match=text):
        setup("build_ext", **environment)


def test_auto_builds_nothing_without_a_compiler(tmp_path):
    environment = {"TVKERNELS_BUILD": "auto", "CXX": "no-such-compiler"}
    setup("build_ext", "--build-lib", str(tmp_path), **environment)
    assert not list(tmp_path.rglob("*.so"))


# Stands for g++: writes what is asked for, and says whether there was a library all the while.
COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do case $1 in -o) out=$2 ;; -MF) dep=$2 ;; esac; shift; done
[ -e tvkernels/_C_cpu.so ] || touch missing
[ -z "$dep" ] || echo "$out: $0" >"$dep"
[ ! -e refuse ] || exit 1
echo new >"$out"
"""


def test_a_library_serves_until_the_next_is_whole(tmp_path):
    """And no longer: where a compiler fails, none of older sources is left."""
    for name in ("setup.py", "pyproject.toml", "README.md", "csrc"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "tvkernels").mkdir()
    library = tmp_path / "tvkernels" / "_C_cpu.so"
    library.write_text("old", encoding="utf-8")
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER, encoding="utf-8")
    compiler.chmod(0o755)
    environment = {"TVKERNELS_BUILD": "1", "TVKERNELS_CUDA_ARCHS": "", "CXX": str(compiler)}

    def build():
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        return subprocess.run(command, cwd=tmp_path, env=os.environ | environment, check=False)

    with open(library, encoding="utf-8") as held:
        assert build().returncode == 0
        assert held.read() == "old" and library.read_text(encoding="utf-8") == "new\n"
    assert [path.name for path in library.parent.iterdir()] == [library.name]
    (tmp_path / "refuse").touch()
    (tmp_path / "build" / "native").rename(tmp_path / "compiled")
    assert build().returncode != 0
    assert not (tmp_path / "missing").exists() and not library.exists()


@pytest.mark.parametrize("levels", ("avx2", "generic;mmx"))
def test_levels_that_cannot_be_built_are_one_clear_line(levels):
    with pytest.raises(AssertionError, match="use generic, and wide, generic, avx2, avx512"):
        setup("build_ext", TVKERNELS_BUILD="1", TVKERNELS_LEVELS=levels)


@pytest.mark.slow
@compiler
def test_under_sanitizers(tmp_path):
    """Reads and writes out of bounds, counts that no vector has, and what C++ leaves undefined,
    end the program: at every level of this CPU, and at 16 floats a vector on any.
    """
    ours = LEVELS[: LEVELS.index(BEST) + 1]
    setup(
        "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "temp"),
        TVKERNELS_BUILD="1", TVKERNELS_CUDA_ARCHS="", TVKERNELS_LEVELS=";".join(ours),
        # With -g g++ takes twice as long.
        CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -O1 -g1 -Wno-error",
    )  # fmt: skip
    preload = [run("g++", f"-print-file-name=lib{name}.so").strip() for name in ("asan", "ubsan")]

    def fuzz(level):
        return run(
            sys.executable, "tests/csrc/native_fuzz.py", str(tmp_path / "tvkernels"), "30",
            LD_PRELOAD=":".join(preload), TVKERNELS_CPU_LEVEL=level,
            # Python and torch keep memory to their end: leaks say nothing here.
            ASAN_OPTIONS="detect_leaks=0,halt_on_error=1",
            OMP_NUM_THREADS="2",
        )  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        for level, said in zip(ours, pool.map(fuzz, ours), strict=True):
            assert said.rstrip().endswith(f"level {level}")


@built
def test_more_dimensions_than_it_takes_are_a_reason():
    sample = torch.randn([2] * 9).permute(*range(8, -1, -1))
    step = torch.tensor([0.5, 0.6, 1.0])
    with pytest.raises(BackendError, match="9 dimensions are more than 8"):
        tvkernels.guided_ddim_step(sample, sample, step, backend="native")
    assert tvkernels.guided_ddim_step(sample, sample, step).shape == sample.shape


@built
def test_a_library_that_lacks_a_backward_is_refused():
    """Built from older sources, it would else leave the gradients to a slower backend unsaid."""
    x = torch.randn(2)
    assert _native.refuse("clip_group_norm", x, backward="clip_group_norm_backward") == []
    (reason,) = _native.refuse("clip_group_norm", x, backward="of_later_sources")
    assert "was built without of_later_sources: run `make native`" in reason
