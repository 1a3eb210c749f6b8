"""Medusa (Cai et al. 2024, 2401.10774): heads on the target's last hidden state, one for each token ahead."""
