"""What speculation and disaggregation are worth on hardware that need not be here: closed forms and rooflines."""
