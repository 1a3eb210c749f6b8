"""KV memory: the page pool (pure bookkeeping, no torch) and the paged tensors."""
