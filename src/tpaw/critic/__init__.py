"""A critic: a classifier that learns to tell targets from a model's own responses."""
