"""EAGLE-3 (Li et al. 2025, 2503.01840): one decoder layer that drafts from three fused levels of the target."""
