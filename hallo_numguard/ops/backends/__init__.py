"""One module per backend and device; the folder listing is the support matrix."""
