"""Traces: hooks on the modules of a model, and the frames that they record."""
