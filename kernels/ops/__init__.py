"""Numerical operations: one torch reference each, a Triton version where it pays, and a dispatcher."""
