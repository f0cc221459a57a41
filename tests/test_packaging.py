"""What installs, where from, and what it needs."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import tvkernels

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or newer reads pyproject.toml")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def name(requirement: str) -> str:
    return requirement.partition(";")[0].strip().split("[")[0].rstrip("<>=!~.,0123456789 ")


def test_torch_is_the_only_requirement():
    assert [name(line) for line in PROJECT["project"]["dependencies"]] == ["torch"]


def test_the_build_needs_setuptools_alone():
    assert [name(line) for line in PROJECT["build-system"]["requires"]] == ["setuptools"]


def test_extras():
    kinds = {
        "diffusers", "video", "cli", "atlas", "export", "tensorrt-rtx", "bench", "dev", "all",
    }  # fmt: skip
    assert set(EXTRAS) == kinds
    (everything,) = EXTRAS["all"]
    listed = everything.removeprefix("tvkernels[").removesuffix("]").split(",")
    assert set(listed) == set(EXTRAS) - {"all"}


def test_everything_that_make_installs_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(line.count("==") == 1 for line in pins)
    pinned = {line.partition("==")[0].lower() for line in pins}
    makefile = (ROOT / "Makefile").read_text()
    installed = makefile.partition("EXTRAS ?= ")[2].partition("\n")[0].split(",")
    for extra in installed:
        assert {name(line).lower() for line in EXTRAS[extra]} <= pinned, extra
    assert {"torch", "setuptools"} <= pinned


def test_versions_agree():
    assert PROJECT["project"]["version"] == tvkernels.__version__


@pytest.mark.parametrize("where", ["the root", "elsewhere"])
def test_folders_import_under_the_package(where, tmp_path):
    """From the root, where the folders are also importable by their own names, and elsewhere."""
    packages = ["tvkernels", "tvkernels.pipelines", "tvkernels.benchmarks"]
    code = (
        "import importlib, json; "
        f"print(json.dumps([importlib.import_module(p).__file__ for p in {packages}]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT if where == "the root" else tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    files = [Path(file) for file in json.loads(result.stdout)]
    assert all(file.name == "__init__.py" for file in files)
    installed = Path(tvkernels.__file__).parent
    assert files[0] == installed / "__init__.py"
    assert [file.parent.name for file in files[1:]] == ["pipelines", "benchmarks"]


def test_setup_names_every_package(monkeypatch):
    """A folder of modules that is not listed would be missing from the wheel."""
    given = {}
    monkeypatch.setattr("setuptools.setup", lambda **options: given.update(options))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    homes = {"tvkernels": "tvkernels", **given["package_dir"]}
    expected = {
        ".".join((package, *file.parent.relative_to(ROOT / folder).parts))
        for package, folder in homes.items()
        for file in (ROOT / folder).rglob("*.py")
    }
    assert set(given["packages"]) == expected
