"""Reference log-probs, each pair computed once in a run."""
