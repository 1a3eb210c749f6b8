"""The handoff: frames, their ledger, and one small file per byte mover."""
