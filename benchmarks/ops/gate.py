"""One op in one dtype on a device: every case against float64, then the same bits 20 times over.

`gpu.py` runs this in processes of their own, so that a kernel that takes the device down with it
loses only its own op.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tvkernels._dispatch import ON_DEVICE, OPS, brings_backward
from tvkernels.benchmarks.cases import inputs
from tvkernels.benchmarks.ops import checks
from tvkernels.devices import out_of_memory
from tvkernels.testing.calls import copied, registered_arguments, tensors
from tvkernels.testing.spec import OpSpec

RUNS = 20
SEEDS = range(8)  # draws whose gradients are judged together: one of a tiny case is luck
RIGHT, WRONG, REFUSED, SKIPPED = "right", "wrong", "refused", "skipped"


class DeviceLost(RuntimeError):
    """The device answers nothing in this process any more."""


@dataclass(frozen=True)
class Job:
    """One thing to check: a case by a backend, forward or backward."""

    case: str
    backend: str
    backward: bool = False
    layout: str = "dense"
    repeats: bool = False


def jobs(spec: OpSpec, backends: tuple[str, ...], *, real: bool = True) -> list[Job]:
    """Everything to check of an op, what matters most first.

    Args:
        backends: of the op, without the reference.
        real: the real UNets' cases too.
    """
    cases = [spec.small_cases, spec.real_cases if real else []]
    own = tuple(b for b in backends if b in ON_DEVICE)
    found = []
    for some, backward in itertools.product(cases, (False, True)):
        if backward and not spec.gradients:
            continue
        # A composed backend has no kernels of its own that a real shape could break.
        for case, backend in itertools.product(some, backends if some is cases[0] else own):
            layouts = ("dense", "permuted") if some is cases[0] and not backward else ("dense",)
            found += [Job(case, backend, backward, layout) for layout in layouts]
    repeated = itertools.product(itertools.chain(*cases), own, (False, True))
    found += [
        Job(case, backend, backward, repeats=True)
        for case, backend, backward in repeated
        if not backward or spec.gradients
    ]
    return found


def run(
    spec: OpSpec,
    dtype: torch.dtype,
    device: torch.device,
    chosen: list[Job],
    until: float = float("inf"),
) -> Iterator[dict]:
    """A row for each job; past `until` (of `time.time()`) they are skipped, and say so.

    Raises:
        DeviceLost: after the row that tells of it.
    """
    for job in chosen:
        row = {
            "step": "repeat" if job.repeats else "check", "op": spec.name, "case": job.case,
            "dtype": str(dtype).removeprefix("torch."), "backend": job.backend,
            "backward": job.backward, "layout": job.layout, "error": None, "budget": None,
            "checked": None, "reason": None,
        }  # fmt: skip
        if time.time() > until:
            yield row | {"status": SKIPPED, "reason": "no time was left"}
            continue
        try:
            reasons = refusals(spec, job, dtype, device)
            if reasons:
                yield row | {"status": REFUSED, "reason": "; ".join(reasons)}
                continue
            yield row | (repeat if job.repeats else check)(spec, job, dtype, device)
        except Exception as error:  # whatever a kernel raises, it gave no right result
            if out_of_memory(error):
                torch.cuda.empty_cache()
                reason = f"too little memory: {str(error).partition('. ')[0]}"
                yield row | {"status": SKIPPED, "reason": reason}
                continue
            text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            yield row | {"status": WRONG, "reason": text}
            if lost(device):
                raise DeviceLost(text) from error
        if device.type == "cuda" and job.case in spec.real_cases:
            torch.cuda.empty_cache()  # others check beside this process


def refusals(spec: OpSpec, job: Job, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Why the backend does not take this call."""
    op = OPS[spec.name]
    args = registered_arguments(spec, inputs(spec, job.case, dtype, device))
    reasons = op.why_not(job.backend, *args)
    if reasons or not job.backward or job.backend not in ON_DEVICE:
        return reasons
    # What torch's own operators sum in any order is no race of a kernel.
    ours = brings_backward(op.backend(job.backend), args)
    asked = job.repeats or job.case in spec.real_cases
    return ["its gradients are composed PyTorch's"] if asked and not ours else []


def check(spec: OpSpec, job: Job, dtype: torch.dtype, device: torch.device) -> dict:
    """The result, or the gradients, within the budget of the reference in float64."""
    small = job.case in spec.small_cases
    draws = []
    for seed in SEEDS if job.backward and small else (0,):
        args = inputs(spec, job.case, dtype, device, seed=seed, layout=job.layout)
        truth = checks.truth(spec, args, backward=job.backward)
        checks.leave_nan(truth.low)
        with checks.poisoned():
            draws.append((truth, call(spec, job, args)()))
    truth, actual = draws[0]
    if len(draws) > 1:
        truth.exact = _stacked([t.exact for t, _ in draws])
        truth.low = _stacked([t.low for t, _ in draws])
        actual = _stacked([results for _, results in draws])
    verdict = checks.judge(actual, truth)
    found = {"error": verdict.error, "budget": verdict.budget, "checked": truth.part}
    if verdict.right:
        return found | {"status": RIGHT}
    fault = verdict.fault or f"error {verdict.error:.3e} above its budget of {verdict.budget:.3e}"
    return found | {"status": WRONG, "reason": fault}


def repeat(spec: OpSpec, job: Job, dtype: torch.dtype, device: torch.device) -> dict:
    """The same call 20 times: other bits are a race, where nothing is summed in random order."""
    args = inputs(spec, job.case, dtype, device)
    differing = checks.differing_runs(call(spec, job, args), RUNS)
    if not differing:
        return {"status": RIGHT}
    return {"status": WRONG, "reason": f"{differing} of {RUNS} runs gave other bits: a race"}


def call(spec: OpSpec, job: Job, args) -> Callable[[], list[Tensor]]:
    """A call that gives the results, or the gradients, of the job's backend."""
    given = copied(args)
    in_place = OPS[spec.name].overload._schema.is_mutable

    def forward():
        own = copied(args) if in_place else given
        return spec.call(*own[0], **own[1], backend=job.backend)

    if job.backward:
        outer = checks.outer_gradients(spec, args)
        return lambda: checks.differentiate(spec, given, forward, outer)

    def run():
        with torch.no_grad():
            return tensors(forward())

    return run


def lost(device: torch.device) -> bool:
    """Whether the device fails at anything at all now, as after an illegal access."""
    try:
        torch.ones(1, device=device).item()
    except RuntimeError:
        return True
    return False


def _stacked(draws: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(same) for same in zip(*draws, strict=True)]
