"""Timing, limits, rivals and reports; installed as `tvkernels.benchmarks`."""
