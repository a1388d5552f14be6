"""Causal generation: attention masks, KV cache, chunk generator."""
