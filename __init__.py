"""Reelway: distil bidirectional video diffusion models into streaming causal ones, at cluster scale."""

__version__ = "0.1.0"
