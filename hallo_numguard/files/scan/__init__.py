"""What the values in files are: one read of a file for digests, records and pages, and the rules that judge them."""
