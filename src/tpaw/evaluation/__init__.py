"""Is θ_t better? Held-out evaluation, benchmarks, a judge, comparisons."""
