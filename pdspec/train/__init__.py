"""Draft-head training: text written by the target itself, and heads that learn to continue it."""
