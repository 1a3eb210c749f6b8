"""One answer, step by step: what was drafted, what the target said of it, and what became of the KV."""
