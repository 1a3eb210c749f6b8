"""Tensor parallelism: a worker of several ranks, each with a part of every layer and of its KV pages."""
