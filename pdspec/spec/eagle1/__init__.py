"""EAGLE-1 (Li et al. 2024, 2401.15077): one decoder layer that continues the target's last hidden states."""
