"""Which heads, weights and cache pages each device holds."""
