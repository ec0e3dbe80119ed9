"""Chaos: at a random part of the guard something goes wrong, and the run must not notice."""
