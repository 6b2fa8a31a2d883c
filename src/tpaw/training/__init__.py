"""From triples to the next checkpoint."""
