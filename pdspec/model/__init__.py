"""Model: configuration, loading, weights, the forward pass."""
