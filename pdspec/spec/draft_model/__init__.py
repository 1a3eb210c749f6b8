"""A smaller model with the target's tokenizer drafts (Leviathan et al. 2023, 2211.17192)."""
