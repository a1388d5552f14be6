"""Pretraining of the tiny VAE, text encoder and teacher on the sprites world."""
