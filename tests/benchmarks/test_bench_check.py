"""`make bench-check`: a slowdown and a heavier call are found, noise is not."""

import dataclasses
import time

import numpy as np
import pytest

from tvkernels.benchmarks import cases, check

OP, CASE = "latent_blend", "sd15-512~cpu"


def noisy(seed, slower=1.0, count=40):
    """Six ratios, 20 % of noise, for each of many cases."""
    draw = np.random.default_rng(seed)
    return {
        ("op", str(case)): (list(slower * np.exp(draw.normal(0, 0.2, 6))), 100)
        for case in range(count)
    }


def test_noise_is_not_worse():
    seeds = iter(range(1000, 2000))
    wrong = 0
    for seed in range(20):
        before = noisy(2 * seed)
        wrong += len(
            check.confirmed(
                noisy(2 * seed + 1), before, lambda ops: (noisy(next(seeds)), noisy(next(seeds)))
            )
        )
    # Six above six by chance: once in 924 of 800 cases; twelve above twelve once in 2.7 million.
    assert wrong == 0


def test_a_slowdown_beyond_the_noise_is_worse():
    slow, before = noisy(1, slower=3.0), noisy(2)
    lines = check.confirmed(slow, before, lambda ops: (noisy(3, slower=3.0), noisy(4)))
    assert len(lines) > 30
    assert "x the time (noise" in lines[0]
    assert not check.worse(before, slow)


def test_a_byte_more_is_worse():
    found, before = {("op", "a"): ([1.0], 101)}, {("op", "a"): ([1.0], 100), ("op", "b"): ([1], 1)}
    assert check.worse(found, before) == {("op", "a"): "worse: op a: 101 bytes after 100"}
    assert check.worse(before, found) == {}


@pytest.fixture
def one_case(monkeypatch):
    """One case is measured, in this process; a list's first value delays its op by seconds."""
    line_up, delay = cases.line_up, [0.0]

    def slowed(spec):
        def call(*args, backend, **named):
            if backend == "auto":
                time.sleep(delay[0])
            return spec.call(*args, backend=backend, **named)

        return dataclasses.replace(spec, function=call)

    monkeypatch.setattr(
        cases, "line_up",
        lambda *given: [(slowed(s), c) for s, c in line_up([OP], None, check.CPU) if c == CASE],
    )  # fmt: skip
    monkeypatch.setattr(check, "measured", lambda tree, ops: check.measure(ops))
    return delay


def test_a_slower_op_is_found_and_the_same_one_is_not(one_case, monkeypatch, tmp_path):
    monkeypatch.setattr(check, "RESULTS", tmp_path / "check.jsonl")
    said = []
    assert check.main([], said.append) == 2
    assert "--store keeps some" in said[-1]
    assert check.main(["--store"], said.append) == 0
    found = check.stored(check.machine.facts(check.CPU)["device"])
    assert set(found) == {(OP, CASE)} and len(found[OP, CASE][0]) == 6
    assert check.stored("another device") == {}
    one_case[0] = 0.01  # the op itself takes 0.15 ms
    assert check.main([], said.append) == 1
    assert f"worse: {OP} {CASE}: " in said[-2] and "1 got worse" in said[-1]


def test_a_call_that_holds_more_is_found(monkeypatch):
    spec, case = next(x for x in cases.line_up([OP], None, check.CPU) if x[1] == CASE)

    def call(*args, **named):
        kept = args[0].clone() if named["backend"] == "auto" else None
        result = spec.call(*args, **named)
        return result, kept

    before = check.measure([OP])
    heavier = [(dataclasses.replace(spec, function=call), case)]
    monkeypatch.setattr(cases, "line_up", lambda *given: heavier)
    (line,) = check.worse(
        {k: ([0.0], b) for k, (_, b) in check.measure().items()}, before
    ).values()
    assert "bytes after" in line


@pytest.mark.slow
def test_a_tree_measures_its_own_package(tmp_path):
    check.check_out("HEAD", tmp_path)
    assert (tmp_path / "tvkernels" / "ops").is_dir()
    spec = tmp_path / "tvkernels" / "ops" / OP / "spec.py"
    spec.write_text(
        spec.read_text(encoding="utf-8").replace("sd15-512", "sd15-of-this-tree"), encoding="utf-8"
    )
    assert (OP, "sd15-of-this-tree~cpu") in check.measured(tmp_path, [OP])
