"""Checks of a run before its first step, one module per question. Each returns findings."""
