"""The report of versions, devices and backends, in this process and with torch alone."""

import json

import torch
from fresh import printed

from tvkernels import __version__, info
from tvkernels._dispatch import BACKENDS, OPS
from tvkernels.ops import NAMES

BLOCKED = """
import sys
for name in ("triton", "diffusers", "transformers", "numpy", "av", "typer", "rich"):
    sys.modules[name] = None
from tvkernels import info
info.main(sys.argv[1:])
"""


def test_every_op_and_backend_is_listed():
    data = info.report()
    assert list(data["ops"]) == list(NAMES)
    assert data["runtimes"]["eager"] == [] and len(data["runtimes"]) == 6
    for name, op in data["ops"].items():
        assert list(op["backends"]) == list(BACKENDS)
        assert op["backends"]["cpu"] == []
        assert op["backends"]["reference"] == []
        for backend in set(BACKENDS) - set(OPS[name].backends):
            assert op["backends"][backend] == [f"{name} has no {backend} backend in this version"]
    assert data["versions"]["tvkernels"] == __version__
    assert data["versions"]["torch"] == torch.__version__
    assert data["sample"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert len(data["devices"]) == 1 + torch.cuda.device_count()
    assert json.loads(json.dumps(data)) == data


def test_nothing_is_run(monkeypatch):
    """A kernel that would crash must not take the report with it."""

    def crash(*args):
        raise AssertionError("a backend ran")

    for name in NAMES:
        for backend in OPS[name].backends:
            monkeypatch.setattr(OPS[name].backend(backend), "forward", crash)
    assert all(op["backends"]["cpu"] == [] for op in info.report()["ops"].values())


def test_all_reasons_are_shown(monkeypatch):
    op = OPS["instance_center"]
    monkeypatch.setattr(op.backend("cpu"), "why_not", lambda *args: ["too hot", "too late"])
    monkeypatch.setattr(op, "backends", ("cuda", "cpu", "reference"))
    data = info.report()
    found = data["ops"]["instance_center"]["backends"]
    assert found["cpu"] == ["too hot", "too late"]
    assert "tvkernels.ops.instance_center.cuda" in found["cuda"][0]
    assert "cpu        too hot; too late" in info.text(data)


def test_why_not_sees_the_arguments_of_the_op(monkeypatch):
    seen = {}
    for name in NAMES:
        monkeypatch.setattr(
            OPS[name].backend("cpu"),
            "why_not",
            lambda *a, name=name: seen.setdefault(name, a) and [],
        )
    info.report()
    assert list(seen) == list(NAMES)
    for name, args in seen.items():
        assert len(args) == len(OPS[name].overload._schema.arguments) - 1
        assert isinstance(args[0], torch.Tensor)


def test_a_broken_op_does_not_break_the_report(monkeypatch):
    monkeypatch.setattr("tvkernels.latent_blend", lambda *args: 1 / 0)
    found = info.report()["ops"]
    reason = "the sample call failed: ZeroDivisionError: division by zero"
    assert found["latent_blend"]["backends"]["cpu"] == [reason]
    assert found["clip_group_norm"]["backends"]["cpu"] == []


def test_missing_packages_are_said(monkeypatch):
    def version(name):
        raise info.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(info.metadata, "version", version)
    versions = info.report()["versions"]
    assert {versions[name] for name in info.PACKAGES} == {info.NOT_INSTALLED}


def test_with_torch_alone():
    data = json.loads(printed(BLOCKED, "--json"))
    assert list(data["ops"]) == list(NAMES)
    assert all(op["backends"]["cpu"] == [] for op in data["ops"].values())


def test_module_prints_text():
    code = "import runpy; runpy.run_module('tvkernels.info', run_name='__main__', alter_sys=True)"
    text = printed(code)
    assert "frame_attention (own)\n  triton     " in text
    assert "\n  cuda       frame_attention has no cuda backend" in text
    assert text.count("cpu        runs") == len(NAMES)
