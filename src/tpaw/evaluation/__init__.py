"""Step 5: is θ_t better? Held-out evaluation, benchmarks, a judge and comparisons."""
