"""Causes of NaN and Inf, each planted in every way of training where it makes sense, and what the guard says."""
