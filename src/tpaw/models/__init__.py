"""Models: checks before loading, loading, fingerprints, tokenizers, names of checkpoints."""
