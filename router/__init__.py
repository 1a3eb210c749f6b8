"""The token router: tokenises, validates, picks workers, streams text, and moves a stream when a worker dies.

policy (pure) · fleet (what is known of the workers) · admission · answer (one request's life) · service · relay
"""
