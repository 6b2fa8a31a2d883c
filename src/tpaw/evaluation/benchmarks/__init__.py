"""Benchmarks: suites of lm-evaluation-harness tasks."""
