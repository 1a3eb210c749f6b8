"""Lookahead decoding (Fu et al. 2024, 2402.02057): n-grams that the target makes for itself by Jacobi iteration."""
