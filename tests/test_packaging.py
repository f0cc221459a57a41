"""What installs, where from, and what it needs."""

import json
import runpy
import sys
import tomllib
from pathlib import Path

import pytest
import pythons
from fresh import printed

import tvkernels

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
HERE = "{}.{}".format(*sys.version_info)


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


def test_pythons_agree():
    """What is promised is what `.ci/pythons.py` tries, from the pins' own Python on."""
    oldest = pythons.promised()[0]
    assert pythons.promised() == sorted(pythons.promised(), key=lambda v: int(v.split(".")[1]))
    assert PROJECT["project"]["requires-python"] == f">={oldest}"
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert f"Python {oldest} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"Python {oldest} or newer" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_a_python_that_is_not_here_is_said_and_a_broken_file_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pythons, "PLACES", ())
    monkeypatch.setattr(pythons, "promised", lambda: ["3.1", HERE])
    monkeypatch.setattr(pythons, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / f"python{HERE}").symlink_to(sys.executable)
    (tmp_path / "setup.py").write_text("match 1:\n    case _: pass\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["pythons.py"])
    assert pythons.main() == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "Python 3.1: not run, no interpreter of it here"
    assert said[1].startswith(f"Python {HERE}: ok: 1 files compiled; import was not run")
    (tmp_path / "setup.py").write_text("'\\d'\n", encoding="utf-8")
    assert pythons.main() == 1
    assert "FAILED" in capsys.readouterr().out


def test_everything_that_make_installs_is_pinned():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(line.count("==") == 1 for line in pins)
    pinned = {line.partition("==")[0].lower() for line in pins}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
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
    found = printed(code, cwd=ROOT if where == "the root" else tmp_path)
    files = [Path(file) for file in json.loads(found)]
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
