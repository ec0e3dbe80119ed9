"""From the records of a step to a verdict: diagnosis, agreement of ranks, policy, flight recorder."""
