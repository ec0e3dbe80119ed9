"""Statistics of tensors: the operators and their backends."""
