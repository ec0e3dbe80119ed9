"""Tensors in, statistics out: the operators and their backends."""
