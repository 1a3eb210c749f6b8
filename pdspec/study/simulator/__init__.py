"""Traces on simulated workers: real router policy, real schedulers, a clock that jumps, measured or modelled times."""
