"""Rotation and health checks of checkpoints."""
