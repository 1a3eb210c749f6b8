"""Suffix with a learned head: what stood before where that is credible, the head otherwise."""
