"""The numerics guard for PyTorch and DeepSpeed training.

Importing this package imports neither torch nor deepspeed nor triton: names are found in `__init__.pyi`, and resolved
when they are first used.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
