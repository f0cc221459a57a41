"""Ranges for profilers, nested as the work is: method, step, layer, op.

While they are on, by `on()` or for a whole program by TVKERNELS_NVTX=1, each shows in NVTX's
domain "tvkernels", its kind as the category, and in torch.profiler as "tvkernels/<kind>/<name>".
Layers come from hooks that exist only meanwhile: what torch.compile has taken whole shows its ops
alone, in the same single graph, and is compiled once more when ranges are switched.
Off, a span costs 0.2 us, where the call of an op takes 59 (one thread of a crowded x86-64).
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

DOMAIN = "tvkernels"
KINDS = ("method", "step", "layer", "op")
T = TypeVar("T")

_NOTHING = nullcontext()
_on = False
_path: list[tuple[str, str]] = []
_models: WeakSet[nn.Module] = WeakSet()
_hooks: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()


def span(kind: str, name: str, number: int | None = None) -> AbstractContextManager:
    """A range around what is done inside; nothing while ranges are off or code is compiled.

    Args:
        kind: one of `KINDS`.
        name: the same for all that shall be added up.
        number: which of them this is, NVTX's payload.
    """
    return _open(kind, name, number) if _on and not torch.compiler.is_compiling() else _NOTHING


def each_step(items: Iterable[T]) -> Iterator[T]:
    """The items of a loop whose body is a step."""
    for number, item in enumerate(items):
        with span("step", "step", number):
            yield item


def watch(model: nn.Module) -> None:
    """Has a model's layers show while ranges are on; again where modules were added to it.

    A layer is a module with parts of its own: what has none is one op.
    """
    _models.add(model)
    for name, module in model.named_modules() if _on else ():
        if module not in _hooks and any(True for _ in module.children()):
            layer = _Layer(name or type(model).__name__)
            _hooks[module] = (
                module.register_forward_pre_hook(layer.enter),
                module.register_forward_hook(layer.leave, always_call=True),
            )


@contextmanager
def on() -> Iterator[None]:
    """Inside, ranges are on."""
    before = _switch(True)
    try:
        yield
    finally:
        _switch(before)


def path() -> tuple[tuple[str, str], ...]:
    """(kind, name) of the ranges that are open, the outermost first."""
    return tuple(_path)


@contextmanager
def _open(kind: str, name: str, number: int | None) -> Iterator[None]:
    domain, title = _domain(), f"{DOMAIN}/{kind}/{name}"
    profiled = torch.autograd._profiler_enabled()
    _path.append((kind, name))
    if domain is not None:
        domain.push_range(message=name, category=kind, payload=number)
    try:
        with torch.profiler.record_function(title) if profiled else _NOTHING:
            yield
    finally:
        if domain is not None:
            domain.pop_range()
        _path.pop()


@functools.cache
def _domain():
    """NVTX's, torch's where the package nvtx is missing, or None without any."""
    try:
        import nvtx
    except ImportError:
        return _TorchDomain() if torch.cuda.is_available() else None
    return nvtx.get_domain(DOMAIN)


class _TorchDomain:
    """NVTX as torch brings it, which has neither domains nor categories."""

    def push_range(self, message: str, category: str, payload: int | None) -> None:
        torch.cuda.nvtx.range_push(f"{DOMAIN}/{category}/{message}")

    def pop_range(self) -> None:
        torch.cuda.nvtx.range_pop()


class _Layer:
    """A module's hooks."""

    def __init__(self, name: str):
        self.name, self.opened = name, []

    def enter(self, module, args) -> None:
        if not torch.compiler.is_compiling():
            self.opened.append(span("layer", self.name))
            self.opened[-1].__enter__()

    def leave(self, module, args, out) -> None:
        # Another hook may have refused the call before this one's `enter`.
        if not torch.compiler.is_compiling() and self.opened:
            self.opened.pop().__exit__(None, None, None)


def is_range(hook) -> bool:
    """Whether a module's hook is one of these, which change nothing."""
    return isinstance(getattr(hook, "__self__", None), _Layer)


def _switch(wanted: bool) -> bool:
    """Returns what was before."""
    global _on
    before, _on = _on, wanted
    if wanted:
        for model in list(_models):
            watch(model)
    else:
        for hook in (hook for pair in _hooks.values() for hook in pair):
            hook.remove()
        _hooks.clear()
    return before


if os.environ.get("TVKERNELS_NVTX", "0") != "0":
    if _domain() is None:
        warnings.warn("TVKERNELS_NVTX: no NVTX here: pip install nvtx", stacklevel=2)
    _switch(True)
