"""Losses as pure functions of log-probs."""
