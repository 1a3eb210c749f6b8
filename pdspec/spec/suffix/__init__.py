"""SuffixDecoding (Oliaro et al. 2024, 2411.04975): drafts copied from this request and from earlier answers."""
