"""The embedded video world: renderer, captions, oracle."""
