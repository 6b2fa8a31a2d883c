"""Is θ_t better? Exact match, held-out log-probs, and the statistics to say so honestly."""
