"""Groups of tensors by module, so that a few lines name many of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

MAX_GROUPS = 4


def by_module(names: Sequence[str], all_names: Iterable[str]) -> dict[str, list[str]]:
    """Returns `names` by module: the largest modules of which all tensors are among them, or a few that hold them.

    Args:
        names: Fully qualified names.
        all_names: Names of all tensors that could be among them.

    Returns:
        Names by fully qualified name of the module, "" for the root; at most `MAX_GROUPS` groups.
    """
    affected = Counter(module for name in names for module in _modules_of(name))
    total = Counter(module for name in {*all_names, *names} for module in _modules_of(name))
    groups: dict[str, list[str]] = {}
    for name in names:
        modules = list(_modules_of(name))
        whole = next((module for module in modules if affected[module] == total[module]), modules[-1])
        groups.setdefault(whole, []).append(name)
    while len(groups) > MAX_GROUPS:
        groups = _merge_deepest(groups)
    return groups


def _merge_deepest(groups: dict[str, list[str]]) -> dict[str, list[str]]:
    """Moves the groups of the deepest modules to the modules around them."""
    deepest = max(map(_depth, groups))
    merged: dict[str, list[str]] = {}
    for module, names in groups.items():
        target = module.rpartition(".")[0] if _depth(module) == deepest else module
        merged.setdefault(target, []).extend(names)
    return merged


def _depth(module: str) -> int:
    return module.count(".") + 1 if module else 0


def _modules_of(name: str) -> Iterator[str]:
    """Names of all modules around a tensor, the root first."""
    yield ""
    parts = name.split(".")[:-1]
    for end in range(1, len(parts) + 1):
        yield ".".join(parts[:end])
