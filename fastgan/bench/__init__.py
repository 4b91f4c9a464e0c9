"""Benchmarks: the cases, the timing, and the reports."""
