"""log π(y|x): the only place that computes it."""
