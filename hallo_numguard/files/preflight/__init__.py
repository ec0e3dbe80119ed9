"""What can be wrong with a run before its first step, one module a question. Each returns findings."""
