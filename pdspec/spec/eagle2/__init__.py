"""EAGLE-2 (Li et al. 2024, 2406.16858): EAGLE-1's head with dynamic trees (``growth.py``)."""
