"""What an import costs and loads, which layer may import which, and how long files may be."""

import ast
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from fresh import printed

ROOT = Path(__file__).parents[1]
# Folder -> the package it installs as.
PACKAGES = {
    "tvkernels": "tvkernels",
    "pipelines": "tvkernels.pipelines",
    "benchmarks": "tvkernels.benchmarks",
}
MAX_LINES = 600
MAX_IMPORT_MS = 50

LEAVES = {
    "patterns",
    "_dispatch",
    "_compat",
    "_device",
    "_files",
    "devices",
    "_native",
    "_ranges",
    "_triton",
}
LAYER_OF = {
    **dict.fromkeys(LEAVES, "leaf"),
    "processors": "processors",
    "nn": "processors",
    "recipes": "recipes",
    "_inflate": "recipes",
    "published": "recipes",
    "runtime": "runtime",
    "pipelines": "pipelines",
    "atlas": "atlas",
    "video": "video",
    "testing": "testing",
    "__main__": "entry",
    "_console": "entry",
    "cli": "entry",
    "edit": "entry",
    "beforehand": "entry",
    "edit_command": "entry",
    "fronts": "entry",
    "record": "entry",
    "sizing": "entry",
    "export": "entry",
    "config": "entry",
    "demo": "entry",
    "info": "entry",
    "benchmarks": "entry",
}
# What each layer may import besides itself; "public" is the package's own __init__.
CORE = {"processors", "api", "leaf"}
MAY_IMPORT = {
    "leaf": set(),
    "backend": {"leaf"},
    "api": {"leaf"},
    "spec": {"api", "backend", "leaf", "testing"},
    "processors": {"api", "leaf"},
    "recipes": CORE,
    "runtime": {"recipes"} | CORE,
    "public": {"recipes"} | CORE,
    "video": {"leaf"},
    "atlas": {"public", "video"} | CORE,
    "testing": {"public", "api", "spec", "leaf"},
    "pipelines": {"public", "recipes", "runtime", "atlas", "video"} | CORE,
    "entry": {"public", "pipelines", "atlas", "recipes", "runtime", "video", "testing", "spec"}
    | CORE,
}


class Import(NamedTuple):
    module: str  # who imports
    target: str  # what
    place: str  # file:line
    late: bool  # through importlib, when the line runs


def layer(module: str) -> str | None:
    """The layer of a module of the package, None if the design gives it none."""
    parts = module.split(".")[1:]
    if not parts:
        return "public"
    if parts[0] != "ops":
        return LAYER_OF.get(parts[0])
    if len(parts) < 3 or parts[2] == "api":
        return "api"
    return "spec" if parts[2] == "spec" else "backend"


def objection(module: str, target: str, late: bool = False) -> str | None:
    """The rule that ``module`` breaks by importing ``target``, None if it breaks none."""
    top = target.partition(".")[0]
    if top in ("tests", "pipelines", "benchmarks", "csrc"):
        return f"nothing imports the folder {top} by its own name"
    baseline = target.startswith("tvkernels.benchmarks.reference")
    if baseline and not module.startswith("tvkernels.benchmarks."):
        return "only benchmarks and tests import the baselines"
    here, parts = layer(module), target.split(".")
    if top != "tvkernels":
        contract = here == "api" and module.endswith(".api")
        if contract and top != "torch" and top not in sys.stdlib_module_names:
            return "an op's api imports torch and nothing else from outside"
        return None
    there = layer(target)
    if layer(module) is None or there is None:
        name = module if here is None else target
        return f"{name} has no layer: give it one in {Path(__file__).name}"
    if there == "backend" and parts[3] in ("triton", "cuda", "native"):
        return "triton, cuda and native backends are loaded by the dispatcher alone, when they run"
    if late and here == "api" and there == "backend" and parts[2] == module.split(".")[2]:
        return None
    if here == there or there in MAY_IMPORT[here]:
        return None
    return f"{here} may import {', '.join(sorted(MAY_IMPORT[here])) or 'nothing'}, not {there}"


@cache
def sources() -> dict[str, Path]:
    """Every module of the package and its file."""
    found = {}
    for folder, package in PACKAGES.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            found[".".join((package, *parts))] = file
    return found


def imports_of(module: str, file: Path) -> list[Import]:
    """Every import statement in a file, those inside functions too, and import_module("...")."""
    found = []
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        targets, late = [], isinstance(node, ast.Call)
        if isinstance(node, ast.Import):
            targets = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            full = [f"{base}.{name.name}" for name in node.names]
            targets = [name if name in sources() else base for name in full]
        elif late and ast.unparse(node.func).endswith("import_module"):
            targets = [
                arg.value
                for arg in node.args[:1]
                if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            ]
        place = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        found += [Import(module, target, place, late) for target in dict.fromkeys(targets)]
    return found


def test_every_layer_imports_only_layers_to_its_right():
    everything = [found for item in sources().items() for found in imports_of(*item)]
    assert len(everything) > 50, "the parser lost the imports"
    broken = [
        f"{found.place} imports {found.target}: {rule}"
        for found in everything
        if (rule := objection(found.module, found.target, found.late))
    ]
    assert not broken, "\n" + "\n".join(broken)


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("tvkernels.patterns", "tvkernels.recipes"),
        ("tvkernels.ops.frame_attention.api", "tvkernels.ops.frame_attention.reference"),
        ("tvkernels.ops.frame_attention.api", "triton"),
        ("tvkernels.ops.frame_attention.cpu", "tvkernels.ops.frame_attention.triton"),
        ("tvkernels.ops.frame_attention.cpu", "tvkernels.ops.temporal_attention.cuda"),
        ("tvkernels.ops.frame_attention.cpu", "tvkernels.ops.frame_attention.native"),
        ("tvkernels.ops.frame_attention.cpu", "tvkernels.processors"),
        ("tvkernels.processors.attention", "tvkernels.ops.frame_attention.cpu"),
        ("tvkernels.processors.attention", "tvkernels._inflate"),
        ("tvkernels.recipes", "tvkernels.pipelines.ei2"),
        ("tvkernels.pipelines.ei2", "tvkernels.demo.world"),
        ("tvkernels.pipelines.ei2", "tvkernels.ops.frame_attention.reference"),
        ("tvkernels.video.io", "tvkernels.recipes"),
        ("tvkernels.cli", "tests.inputs"),
        ("tvkernels.cli", "pipelines.ei2"),
        ("tvkernels.cli", "tvkernels.benchmarks.reference"),
        ("tvkernels.surprise", "tvkernels.patterns"),
    ],
)
def test_the_checker_objects(module, target):
    assert objection(module, target)


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("tvkernels", "tvkernels._inflate"),
        ("tvkernels.cli", "tvkernels.pipelines.ei2"),
        ("tvkernels.pipelines.ei2", "tvkernels.recipes"),
        ("tvkernels._inflate", "tvkernels.nn"),
        ("tvkernels.nn.norm", "tvkernels.ops.instance_center.api"),
        ("tvkernels.ops.frame_attention.api", "tvkernels._dispatch"),
        ("tvkernels.ops.frame_attention.api", "tvkernels.ops.instance_center.api"),
        ("tvkernels.ops.frame_attention.cpu", "tvkernels.ops.frame_attention.reference"),
        ("tvkernels.ops.frame_attention.triton", "triton"),
        ("tvkernels.ops.frame_attention.spec", "tvkernels.testing.spec"),
    ],
)
def test_the_checker_agrees(module, target):
    assert objection(module, target) is None


def test_an_api_loads_backends_late_and_only_its_own():
    api, ops = "tvkernels.ops.frame_attention.api", "tvkernels.ops"
    assert objection(api, f"{ops}.frame_attention.cpu", late=True) is None
    assert objection(api, f"{ops}.temporal_attention.cpu", late=True)


def test_import_needs_torch_alone_and_touches_no_device():
    printed("""
        import sys

        OTHERS = {"triton", "diffusers", "transformers", "accelerate", "safetensors", "scipy",
                  "av", "PIL", "typer", "rich", "pydantic", "yaml", "onnx", "nvtx"}
        sys.modules.update(dict.fromkeys(OTHERS))  # as if they were not installed
        import torch

        def touched(*args, **kwargs):
            raise AssertionError("import tvkernels asks about a device")

        for name in ("init", "is_available", "device_count", "get_device_capability",
                     "get_device_properties", "current_device"):
            setattr(torch.cuda, name, touched)

        import tvkernels
        import tvkernels.video

        for name in tvkernels.__all__:
            getattr(tvkernels, name)
        assert not torch.cuda.is_initialized()
    """)


def test_import_loads_nothing_of_weight():
    """Nothing is blocked here: what is installed must still not be loaded."""
    loaded = printed("""
        import sys
        import torch
        before = set(sys.modules)
        import tvkernels
        later = {"_inflate", "nn", "ops.atlas_sample", "processors", "published", "recipes"}
        assert not {f"tvkernels.{name}" for name in later} & sys.modules.keys()
        import tvkernels.video
        print(*{name.partition(".")[0] for name in set(sys.modules) - before})
    """).split()
    others = set(loaded) - set(sys.stdlib_module_names) - {"torch", "tvkernels"}
    assert not others, f"import tvkernels also loads {sorted(others)}"


def test_import_is_quick(tmp_path):
    """Processor seconds, so that other work on the machine does not count, and the least of five
    with the bytecode that an installation has: the first run here writes it.
    """
    code = """
        import sys, time
        sys.pycache_prefix, sys.dont_write_bytecode = sys.argv[1], False
        start = time.process_time()
        import tvkernels
        print(1000 * (time.process_time() - start))
    """
    costs = [float(printed(code, tmp_path)) for _ in range(6)][1:]
    assert min(costs) < MAX_IMPORT_MS, f"import tvkernels costs {costs} ms beyond torch"


def test_no_file_is_long():
    folders = (*PACKAGES, "csrc", "tests")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*")]
    suffixes = {".py", ".cu", ".cuh", ".cpp", ".h"}
    lines = {
        file.relative_to(ROOT): len(file.read_text(encoding="utf-8").splitlines())
        for file in [*files, ROOT / "setup.py"]
        if file.suffix in suffixes
    }
    long = [f"{file} has {count} lines" for file, count in lines.items() if count > MAX_LINES]
    assert not long, f"the limit is {MAX_LINES}: " + ", ".join(long)
