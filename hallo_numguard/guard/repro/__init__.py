"""Bundles that reproduce a fault in one process."""
