"""Chooses, by device, the version of each operation that runs."""

from .reference import attention, gated_residual, layer_norm_modulate, rms_norm, rms_norm_rotary, rotate

__all__ = ["attention", "gated_residual", "layer_norm_modulate", "rms_norm", "rms_norm_rotary", "rotate"]
