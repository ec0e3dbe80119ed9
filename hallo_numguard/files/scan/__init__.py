"""Tensor values in files: one read of a file for statistics, digests and pages, and the rules that judge them."""
