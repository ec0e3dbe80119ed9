"""Checkpoints of which one is always known to be good."""
