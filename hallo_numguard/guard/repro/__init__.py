"""Bundles that make a fault again in one process."""
