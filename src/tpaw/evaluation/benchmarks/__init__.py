"""Suites of lm-evaluation-harness benchmarks."""
