"""Training objectives as functions of tensors and networks."""
