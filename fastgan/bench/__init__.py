"""Benchmarks: what is timed, how it is timed, and how results are reported."""
