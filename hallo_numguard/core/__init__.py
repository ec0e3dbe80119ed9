"""The words that all rooms share: standard library only, imports nothing else of this package."""
