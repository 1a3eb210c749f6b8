"""The prefill role: computes prompts and streams their KV, layer by layer, to decode workers."""
