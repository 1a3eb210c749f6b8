"""The target drafts for itself over a sparse view of its own KV (MagicDec, Chen et al. 2024, 2408.11049)."""
