"""Everything that can run an op: ours by backend, the reference, its compilation, other libraries.

A provider comes in two forms where they differ: "kernel", whose inputs lie as that kernel wants
them, and "as used", which makes them from our public layout [B, F, N, H, D] in every call and
gives back that layout.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tvkernels._dispatch import BACKENDS, OPS
from tvkernels.benchmarks.ops.dense import ATTENTION, Unfit, dense
from tvkernels.processors.libraries import LIBRARIES, attention
from tvkernels.testing.calls import registered_arguments, tensors
from tvkernels.testing.spec import OpSpec

AS_USED, KERNEL = "as used", "kernel"
COMPILED = "reference-compiled"
FLEX = "flex"
# PyTorch's own choice is one of its four kernels, each of which is measured.
ENGINES = [name for name in LIBRARIES if name != "sdpa"]


@dataclass(frozen=True)
class Provider:
    """One way to run a case.

    Args:
        name, form: as `--provider` and the results name it.
        bind: (positional, keyword) arguments of the public function -> a call without arguments.
        public: what the call gives -> results in the public layout, outside the timed part.
        only_first: gives the op's first result alone.
        lossy: computes in fewer bits on purpose: a missed budget is said, not held against it.
        capturable: whether a CUDA graph can hold it: nothing is read on the host.
        slow_start: compiles for seconds before its first call.
    """

    name: str
    form: str
    bind: Callable[[Any], Callable[[], Any]]
    public: Callable[[Any], list[Tensor]] = tensors
    only_first: bool = False
    lossy: bool = False
    capturable: bool = True
    slow_start: bool = False


@dataclass(frozen=True)
class Absent:
    """A provider that cannot take part in a case, and why."""

    name: str
    reason: str


def line_up(
    spec: OpSpec, args, names: Sequence[str] | None = None, *, backward: bool = False
) -> list[Provider | Absent]:
    """Every provider of an op for this call, present or absent with its reason.

    Args:
        args: (positional, keyword) arguments of the public function.
        names: those of `NAMES` wanted, all if None.
        backward: only what gradients pass through, and as used alone.
    Raises:
        ValueError: unknown name.
    """
    check_names(names)
    found: list[Provider | Absent] = []
    for name in NAMES:
        if (names is None or name in names) and (name not in DENSE or spec.name in ATTENTION):
            found += _present_or_not(name, spec, args)
    return [p for p in found if not backward or isinstance(p, Absent) or p.form == AS_USED]


def check_names(names: Sequence[str] | None) -> None:
    """Raises ValueError for a name that is no provider's."""
    for name in names or ():
        if name not in NAMES:
            raise ValueError(f"unknown provider {name!r}: use one of {', '.join(NAMES)}")


def _present_or_not(name: str, spec: OpSpec, args) -> list[Provider | Absent]:
    try:
        if name in BACKENDS:
            return [_own(name, spec, args)]
        if name == COMPILED:
            # frame_attention's reference makes tensors on the host, which no capture takes.
            kept = functools.partial(_compiled, spec)
            capturable = spec.name != "frame_attention"
            return [Provider(name, AS_USED, kept, capturable=capturable, slow_start=True)]
        if name == FLEX:
            return _flex(spec, args)
        return _dense(name, spec, args)
    except Unfit as reason:
        return [Absent(name, str(reason))]
    except ImportError as error:
        return [Absent(name, f"not installed: {error}")]


def _own(backend: str, spec: OpSpec, args) -> Provider:
    reasons = OPS[spec.name].why_not(backend, *registered_arguments(spec, args))
    if backend == "triton" and not reasons and not tensors(args)[0].is_cuda:
        reasons = ["Triton's interpreter runs here: its times mean nothing"]
    if reasons:
        raise Unfit("; ".join(reasons))

    def bind(args):
        return lambda: spec.call(*args[0], **args[1], backend=backend)

    # Composed PyTorch reads frame_attention's table on the host.
    reads = spec.name == "frame_attention" and backend in ("cpu", "reference")
    return Provider(backend, AS_USED, bind, capturable=not reads)


class _OnHost(list):
    """A pattern's table as numbers, for a compiler that would else break at `tolist`."""

    def tolist(self):
        return list(self)


def _compiled(spec: OpSpec, args) -> Callable[[], Any]:
    op = OPS[spec.name]
    forward = op.backend("reference").forward
    given = list(registered_arguments(spec, args))
    returns_lse = True
    if spec.name == "frame_attention":
        given[3:5] = [_OnHost(x.tolist()) for x in given[3:5]]
        returns_lse = given[-1]
    call = torch.compile(forward, dynamic=False)

    def run():
        results = call(*given)
        return results if returns_lse else results[0]

    def run_in_place():
        out = given[0].clone()
        call(out, *given[1:])
        return out

    return run if op.overload._schema.returns else run_in_place


def _dense(name: str, spec: OpSpec, args) -> list[Provider]:
    """A library's attention over queries, keys and values that lie one after the other."""
    attend = attention(name)
    problem = dense(spec, args)
    lossy = name == "sage"
    kept = functools.partial(
        Provider, name, only_first=problem.only_first, lossy=lossy, slow_start=lossy
    )

    def as_used(args):
        own = dense(spec, args)

        def run():
            return own.back(attend(*own.gather(*args[0]), own.scale))

        return run

    def kernel(args):
        own = dense(spec, args)
        gathered = own.gather(*args[0])
        return lambda: attend(*gathered, own.scale)

    found = [kept(AS_USED, as_used)]
    if problem.copies:
        found.append(kept(KERNEL, kernel, lambda out: [problem.back(out)]))
    return found


def _flex(spec: OpSpec, args) -> list[Provider]:
    from tvkernels.benchmarks.ops.flex import flex_problem

    problem = flex_problem(spec, args)

    def as_used(args):
        own, attend = flex_problem(spec, args), flex_attention()
        return lambda: own.back(attend(*own.gather(*args[0]), own.mask, own.scale))

    def kernel(args):
        own, attend = flex_problem(spec, args), flex_attention()
        gathered = own.gather(*args[0])
        return lambda: attend(*gathered, own.mask, own.scale)

    kept = functools.partial(Provider, FLEX, slow_start=True, only_first=problem.only_first)
    found = [kept(AS_USED, as_used)]
    if problem.copies:
        found.append(kept(KERNEL, kernel, lambda out: [problem.back(out)]))
    return found


def flex_attention() -> Callable:
    """FlexAttention, compiled: without that it is no fused kernel."""
    from torch.nn.attention import flex_attention as module

    compiled = torch.compile(module.flex_attention, dynamic=False)
    return lambda q, k, v, mask, scale: compiled(q, k, v, block_mask=mask, scale=scale)


DENSE = (FLEX, *ENGINES)
NAMES = (*BACKENDS, COMPILED, *DENSE)


def first_call(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """What a call gives, or why it cannot: a kernel's refusal stands in warnings beside it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            return call(), None
        except Exception as error:  # whatever a library raises is its reason
            texts = [_first_line(error), *(_first_line(w.message) for w in said)]
            return None, "; ".join(dict.fromkeys(t for t in texts if t))


def _first_line(said: object) -> str:
    first = str(said).strip().partition("\n")[0]
    plain = isinstance(said, (RuntimeError, Warning))  # their types say nothing more
    return first if plain else f"{type(said).__name__}: {first}"
