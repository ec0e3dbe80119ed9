"""The guard of a plain `torch.optim.Optimizer`."""

from hallo_numguard.integrations.optimizer.wrapper import GuardedOptimizer

__all__ = ["GuardedOptimizer"]
