"""Records in, verdict out: attribution, agreement of ranks, policy, flight recorder."""
