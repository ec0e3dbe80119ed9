"""The guard of a plain `torch.optim.Optimizer`."""

from hallo_numguard.integrations.torch_optim.guarded_optimizer import GuardedOptimizer

__all__ = ["GuardedOptimizer"]
