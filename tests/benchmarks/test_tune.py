"""The search for configurations, as far as it goes without a GPU."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("triton")

from tvkernels._triton import configs
from tvkernels.benchmarks.ops import tune


def test_neighbours_differ_in_one_constant():
    config = {"BM": 64, "EMULATE": 0, "num_warps": 4, "num_stages": 1}
    found = list(tune.neighbours(config))
    assert found == [
        config | change
        for change in (
            {"BM": 32}, {"BM": 128}, {"EMULATE": 1}, {"num_warps": 2}, {"num_warps": 8},
            {"num_stages": 2},
        )
    ]  # fmt: skip


def test_an_override_reaches_the_thread_of_a_device():
    """Autograd runs a backward there."""
    override = configs.override("instance_center", "_center", {"A": 1})
    with ThreadPoolExecutor(1) as pool, configs.listen() as questions, override:
        found = pool.submit(configs.choose, "instance_center", "_center", arch="sm_90")
        assert found.result() == {"A": 1}
    assert questions == [("instance_center", "_center", {"arch": "sm_90"})]


def test_an_override_and_what_was_asked():
    with configs.listen() as questions, configs.override("instance_center", "_center", {"A": 1}):
        assert configs.choose("instance_center", "_center", arch="sm_90") == {"A": 1}
    assert questions == [("instance_center", "_center", {"arch": "sm_90"})]
    assert "BLOCK" in configs.choose("instance_center", "_center", arch="sm_90")


def test_a_measured_entry_comes_first_and_replaces_its_predecessor(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "__file__", str(tmp_path / "benchmarks" / "ops" / "tune.py"))
    folder = tmp_path / "tvkernels" / "ops" / "instance_center"
    folder.mkdir(parents=True)
    path = folder / "configs.json"
    shipped = {"kernel": "_center", "config": {"BLOCK": 8}, "source": "reasoned"}
    path.write_text(json.dumps([shipped]), encoding="utf-8")
    facts = {"arch": "sm_90", "dtype": "float16"}
    for block in (16, 32):
        written = tune.write("instance_center", "_center", facts, {"BLOCK": block}, "measured")
        assert written == path
    measured = {
        "kernel": "_center", "arch": ["sm_90"], "dtype": ["float16"], "config": {"BLOCK": 32},
        "source": "measured",
    }  # fmt: skip
    assert json.loads(path.read_text(encoding="utf-8")) == [measured, shipped]


def test_bad_input_is_one_line(monkeypatch):
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="instance_center has no case 'sd15-63'"):
        tune.main(["--op", "instance_center", "--case", "sd15-63"])
    with pytest.raises(SystemExit, match="sees no CUDA device; --static ARCH"):
        tune.main(["--op", "instance_center", "--case", "sd15-64"])
