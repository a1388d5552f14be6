"""One training step per method: ODE regression, causal flow matching, distribution matching."""
