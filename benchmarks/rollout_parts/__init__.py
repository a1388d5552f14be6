"""The parts of `benchmarks/rollouts.py`, one file per kind of measurement."""
