"""Finds the configuration of a kernel and writes it to its op's configs.json.

    python -m tvkernels.benchmarks.ops.tune --op frame_attention --case sd15-own-64

From the shipped configuration, one constant at a time: halved, doubled, or a switch turned. A
neighbour is compiled first and dropped where the offline gate finds a fault, then checked against
the error budget, then timed in turn with the best so far. Nothing is tuned when an op runs. On a
machine without a GPU, `--static sm_90` shows the neighbours' code and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from tvkernels._triton import configs
from tvkernels._triton.launch import arch
from tvkernels.benchmarks import machine
from tvkernels.benchmarks.cases import DTYPES, inputs, number_of_sets
from tvkernels.benchmarks.ops import checks
from tvkernels.benchmarks.ops.run import device_of
from tvkernels.benchmarks.timing import Candidate, interleave
from tvkernels.ops import specs
from tvkernels.testing import kernels
from tvkernels.testing.calls import copied, tensors

ENOUGH = 0.98  # of the best time so far: what a neighbour must reach to replace it
MOST_STAGES, MOST_WARPS = 5, 8
Config = dict[str, int]


def neighbours(config: Config) -> Iterator[Config]:
    """Configurations that differ in one constant."""
    for name, value in config.items():
        if name == "num_stages":
            others = [value - 1, value + 1]
            keep = [n for n in others if 1 <= n <= MOST_STAGES]
        elif value in (0, 1) and name != "num_warps":  # a switch
            keep = [1 - value]
        else:
            limit = MOST_WARPS if name == "num_warps" else value * 2
            keep = [n for n in (value // 2, value * 2) if 1 <= n <= limit]
        yield from (config | {name: n} for n in keep)


def asked(op: str, case: str, dtype: torch.dtype, where: str) -> dict[str, dict]:
    """kernel -> the facts its configuration is chosen by, for one case, forward and backward."""
    with configs.listen() as questions:
        kernels.compilations(op, where, [dtype], [case])
    return {kernel: facts for _, kernel, facts in questions}


def static(op: str, case: str, dtype: torch.dtype, where: str, kernel: str) -> Iterator[dict]:
    """Rows of the offline report for the shipped configuration and its neighbours."""
    facts = asked(op, case, dtype, where)[kernel]
    shipped = configs.choose(op, kernel, **facts)
    for config in (shipped, *neighbours(shipped)):
        found = compiled(op, case, dtype, where, kernel, config)
        if not found:
            print(f"{_text(config)}: does not compile", file=sys.stderr)
        yield from found


def compiled(op, case, dtype, where, kernel, config) -> list[dict]:
    """Rows of the offline report of one kernel under a configuration; none if it fails."""
    with configs.override(op, kernel, config):
        wanted = kernels.compilations(op, where, [dtype], [case])
    try:
        return [kernels.row(c, kernels.measure(c)) for c in wanted if c.kernel == kernel]
    except Exception:  # the compiler's own errors are of many kinds
        return []


def tune(
    op: str, case: str, dtype: torch.dtype, device: torch.device, kernel: str
) -> tuple[Config, float, float]:
    """The best configuration, its seconds, and those of the shipped one."""
    spec = specs()[op]
    args = inputs(spec, case, dtype, device)
    where = arch(args[0][0])
    with configs.listen() as questions:
        spec.call(*args[0], **args[1], backend="triton")
    backward = kernel not in {name for _, name, _ in questions}
    best = configs.choose(op, kernel, **asked(op, case, dtype, where)[kernel])
    truth = checks.truth(spec, args, backward=backward)
    outer = checks.outer_gradients(spec, args) if backward else None
    sets = [copied(args) for _ in range(number_of_sets(_bytes(args), device))]

    def candidate(config: Config) -> Candidate:
        def bind(own):
            def call():
                with configs.override(op, kernel, config):
                    return _call(spec, own, outer)

            return call

        return Candidate(_text(config), [bind(own) for own in sets], capturable=not backward)

    (shipped,) = interleave([candidate(best)], device)
    first = seconds = shipped.median_s
    tried = [best]
    while True:
        better = None
        for config in neighbours(best):
            if config in tried:
                continue
            tried.append(config)
            rows = compiled(op, case, dtype, where, kernel, config)
            if not rows or any(row["faults"] for row in rows):
                continue
            other = candidate(config)
            if not checks.judge(tensors(other.calls[0]()), truth).right:
                print(f"  {other.name}: wrong")
                continue
            mine, theirs = interleave([candidate(best), other], device)
            seconds = mine.median_s if better is None else seconds
            print(f"  {other.name}: {theirs.median_s * 1e6:.1f} us, best {seconds * 1e6:.1f} us")
            if theirs.median_s < ENOUGH * seconds:
                better, seconds = config, theirs.median_s
        if better is None:
            return best, seconds, first
        best = better


def _call(spec, args, outer):
    def run():
        return spec.call(*args[0], **args[1], backend="triton")

    if outer is not None:
        return checks.differentiate(spec, args, run, outer)
    with torch.no_grad():
        return run()


def _bytes(args) -> int:
    return sum(x.nbytes for x in tensors(args))


def _text(config: Config) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items())


def write(op: str, kernel: str, facts: dict, config: Config, source: str) -> Path:
    """Puts an entry for exactly these facts before all others of the op."""
    path = Path(__file__).resolve().parents[2] / "tvkernels" / "ops" / op / "configs.json"
    entry = {"kernel": kernel} | {name: [value] for name, value in facts.items()}
    same = entry.items()
    others = [e for e in json.loads(path.read_text(encoding="utf-8")) if not same <= e.items()]
    entry |= {"config": config, "source": source}
    path.write_text(json.dumps([entry, *others], indent=2) + "\n", encoding="utf-8")
    return path


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", required=True, choices=list(specs()))
    parser.add_argument("--case", required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--kernel", help="one kernel; by default all that the case launches")
    parser.add_argument("--static", metavar="ARCH", choices=list(configs.SHARED_LIMITS))
    options = parser.parse_args(arguments)
    dtype = DTYPES[options.dtype]
    if options.case not in specs()[options.op].cases:
        sys.exit(f"tune: {options.op} has no case {options.case!r}")
    device = None if options.static else _device()
    where = options.static or arch(torch.empty(0, device=device))
    found = asked(options.op, options.case, dtype, where)
    for kernel in [options.kernel] if options.kernel else found:
        if kernel not in found:
            sys.exit(f"tune: this case launches {', '.join(found)}, not {kernel}")
        if options.static:
            rows = list(static(options.op, options.case, dtype, where, kernel))
            print("\n".join(kernels.lines(rows)))
            continue
        config, seconds, first = tune(options.op, options.case, dtype, device, kernel)
        facts, now = machine.facts(device), machine.today()
        source = (
            f"measured: {facts['device']}, driver {facts['driver']}, triton {facts['triton']}, "
            f"ptxas {facts['ptxas']}, {now[:10]}, {options.case}: {seconds * 1e6:.1f} us for the "
            f"whole call, {first * 1e6:.1f} as shipped before"
        )
        path = write(options.op, kernel, found[kernel], config, source)
        print(f"{kernel}: {_text(config)}, {source}; written to {path.name} of {options.op}")


def _device() -> torch.device:
    if not torch.cuda.is_available():
        sys.exit(
            f"tune: torch {torch.__version__} sees no CUDA device; "
            "--static ARCH shows the compiled code of the neighbours"
        )
    return device_of("cuda")


if __name__ == "__main__":
    main()
