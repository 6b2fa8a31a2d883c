"""Intervals and tests, over items and over seeds."""
