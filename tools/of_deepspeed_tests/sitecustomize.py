"""Prepares DeepSpeed in each process that has this folder on its path.

A CPU takes float16, which DeepSpeed refuses there only because it is slow. If NUMGUARD_ATTACH_LOG names a file, every
engine that `deepspeed.initialize` returns gets a guard, and what became of it is added to the file: "attached", or why
it was refused.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


def _guarded(initialize: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(initialize)
    def initialize_and_guard(*args: Any, **kwargs: Any) -> Any:
        import hallo_numguard as ng

        made = initialize(*args, **kwargs)
        try:
            ng.attach(made[0])
            outcome = "attached"
        except ng.UnsupportedDeepSpeed as error:
            outcome = f"refused: {error}"
        with Path(os.environ["NUMGUARD_ATTACH_LOG"]).open("a", encoding="utf-8") as log:
            log.write(outcome + "\n")
        return made

    return initialize_and_guard


def _let_cpus_take_float16() -> None:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    def dtypes(_: object) -> list[Any]:
        import torch

        return [torch.float, torch.half, torch.bfloat16]

    CPU_Accelerator.is_fp16_supported = lambda _: True
    CPU_Accelerator.supported_dtypes = dtypes


class _Loader(importlib.abc.Loader):
    def __init__(self, original: importlib.abc.Loader) -> None:
        self._original = original

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._original.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._original.exec_module(module)
        _let_cpus_take_float16()
        if "NUMGUARD_ATTACH_LOG" in os.environ:
            module.initialize = _guarded(module.initialize)  # type: ignore[attr-defined]


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "deepspeed":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())
