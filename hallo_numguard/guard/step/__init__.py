"""Records of a step while it runs."""
