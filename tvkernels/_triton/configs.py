"""Tile sizes as data: an op's configs.json, first entry that fits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from typing import Any

# Architectures whose configurations ship and are compiled offline, with the shared memory in bytes
# that one program may use there (CUDA programming guide, table of compute capabilities).
SHARED_LIMITS = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
}
INTERPRETER = "interpreter"  # tiles small enough that tiny test shapes still take several


def architecture(major: int, minor: int) -> str:
    """The shipped architecture whose configurations suit compute capability major.minor."""
    if major >= 12:  # consumer Blackwell has 99 KB of shared memory and no wgmma, as sm_89
        return "sm_89"
    number = 10 * major + minor
    known = [int(name[3:]) for name in SHARED_LIMITS]
    return f"sm_{max((n for n in known if n <= number), default=known[0])}"


def choose(op: str, kernel: str, **facts: Any) -> dict[str, int]:
    """The configuration of one kernel of an op: constants of the kernel, num_warps, num_stages.

    Args:
        op: folder in `tvkernels.ops`.
        kernel: the "kernel" of the entries in its configs.json.
        facts: "arch" (as `launch.arch` says), "dtype" ("float16", ...), "head_dim" and the like.
            An entry fits where it agrees with every fact that it names: a list holds the fact,
            {"max": n} is not below it.
    Raises:
        LookupError: no entry fits.
    """
    for asked in _listeners:
        asked.append((op, kernel, facts))
    if (op, kernel) in _overrides:
        return dict(_overrides[op, kernel])
    return dict(_first(op, kernel, tuple(facts.items())))


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's, which kernels call too, takes 8 us on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two of at least n; 0 for none, as Triton has it."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


# Plain objects: autograd runs a device's backward in a thread of its own, which no ContextVar
# reaches.
_overrides: dict[tuple[str, str], dict[str, int]] = {}
_listeners: list[list[tuple[str, str, dict]]] = []


@contextmanager
def listen() -> Iterator[list[tuple[str, str, dict]]]:
    """Inside, every question to `choose` is kept: (op, kernel, facts)."""
    asked: list[tuple[str, str, dict]] = []
    _listeners.append(asked)
    try:
        yield asked
    finally:
        _listeners[:] = [kept for kept in _listeners if kept is not asked]


@contextmanager
def override(op: str, kernel: str, config: dict[str, int]) -> Iterator[None]:
    """Inside, `choose` gives this configuration for one kernel of an op: what tuning tries."""
    before = _overrides.get((op, kernel))
    _overrides[op, kernel] = config
    try:
        yield
    finally:
        if before is None:
            del _overrides[op, kernel]
        else:
            _overrides[op, kernel] = before


@cache
def _first(op: str, kernel: str, facts: tuple[tuple[str, Any], ...]) -> dict[str, int]:
    for entry in entries(op):
        if entry["kernel"] == kernel and all(_fits(entry.get(n), v) for n, v in facts):
            return entry["config"]
    raise LookupError(f"{op}/configs.json has no entry of kernel {kernel!r} for {dict(facts)}")


@cache
def entries(op: str) -> list[dict]:
    """All entries of an op's configs.json, each with "kernel", "config" and "source"."""
    return json.loads((files("tvkernels.ops") / op / "configs.json").read_text(encoding="utf-8"))


def _fits(wanted, fact) -> bool:
    if wanted is None:
        return True
    return fact <= wanted["max"] if isinstance(wanted, dict) else fact in wanted
