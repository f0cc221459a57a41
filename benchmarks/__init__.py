"""Timing, limits, rivals and reports; installed as `tvkernels.benchmarks`."""

from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
