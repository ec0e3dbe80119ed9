"""From what the ranks saw of a bad step to a verdict."""
