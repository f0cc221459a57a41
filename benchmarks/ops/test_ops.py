"""The bench's cases for pytest-benchmark: `pytest benchmarks`, on the GPU where there is one.

    pytest benchmarks -k temporal_attention --benchmark-compare

Whatever `tvk bench ops` knows of limits, memory and turns is not here: this is for comparing one
commit with another. Absent providers are skipped with their reason, wrong results fail.
"""

import pytest
import torch

from tvkernels.benchmarks.cases import inputs, line_up
from tvkernels.benchmarks.ops import checks, rivals, run

pytest.importorskip("pytest_benchmark")

DEVICE = run.device_of(None)
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
CASES = {f"{spec.name}-{case}": (spec, case) for spec, case in line_up(None, None, DEVICE)}


@pytest.mark.parametrize("name", rivals.NAMES)
@pytest.mark.parametrize("case", CASES)
def test_op(benchmark, case, name):
    spec, case = CASES[case]
    args = inputs(spec, case, DTYPE, DEVICE)
    found = rivals.line_up(spec, args, [name])
    if not found:
        pytest.skip(f"{name} is for attention")
    provider = found[0]
    if isinstance(provider, rivals.Absent):
        pytest.skip(provider.reason)
    if provider.slow_start and DEVICE.type == "cpu":
        pytest.skip(run.SLOW_ON_CPU)
    truth = checks.truth(spec, args)
    outcome = run.check(spec, provider, args, None, truth)
    if outcome["status"] == run.CANNOT:
        pytest.skip(outcome["reason"])
    assert outcome["status"] != run.WRONG, outcome["reason"]
    call = run.bound(spec, provider, args, None)

    def finished():
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)

    benchmark.group = f"{spec.name} {case}"
    benchmark(finished)
