"""What can be wrong with a run before its first step, one module per question. Each returns findings."""
