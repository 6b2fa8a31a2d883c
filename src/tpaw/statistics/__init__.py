"""Confidence intervals and tests, over items and over seeds."""
