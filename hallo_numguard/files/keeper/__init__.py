"""Rotation of checkpoints that always keeps one that is known to be healthy."""
