"""One module a backend and device; the folder listing is the support matrix."""
