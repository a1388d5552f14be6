"""The Wan2.1 model family: transformer, streaming VAE, text encoder, checkpoint formats."""
