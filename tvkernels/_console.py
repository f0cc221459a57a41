"""Where commands write, and the exit status of one that found something wrong."""

from __future__ import annotations

import sys

from rich.console import Console

UNEXPECTED = 1


def console() -> Console:
    """Standard output; where it is no terminal, wide enough for every table."""
    return Console(width=None if sys.stdout.isatty() else 160)


def say(text: str) -> None:
    console().print(text, markup=False, highlight=False, soft_wrap=True)
