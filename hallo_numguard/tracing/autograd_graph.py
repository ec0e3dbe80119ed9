"""What the graph that autograd has kept says: operations between a model's output and a loss, and the leaves."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch

MAX_NODES = 10_000
_MAKES_NOTHING = frozenset(("accumulategrad", "add", "cat", "copyslices", "index", "slice", "stack", "sub", "sum")) | {
    *("alias", "asstrided", "clone", "copy", "detach", "expand", "flatten", "permute", "reshape", "select", "split"),
    *("squeeze", "t", "tobackward", "tocopy", "transpose", "unbind", "unsafeview", "unsqueeze", "view"),
}
_OFTEN = ("div", "log", "sqrt", "rsqrt", "pow", "exp", "std", "var", "norm", "nllloss", "ctcloss", "logsoftmax", "acos")
"""Nodes whose operations are often the cause, the most frequent first."""


def names_after(loss: Any, numbers: Iterable[int]) -> list[str]:
    """Returns the names of the operations that made a loss of a model's outputs, the likeliest to make NaN first.

    Autograd numbers its nodes as it makes them, so those made after the model's outputs are the caller's.

    Args:
        loss: Autograd node of the loss; None if it has none.
        numbers: Numbers of the nodes of the model's outputs.
    """
    after = max(numbers, default=-1)
    names: Counter[str] = Counter()
    waiting, seen = [loss] if loss is not None else [], {loss}
    while waiting and len(seen) < MAX_NODES:
        node = waiting.pop()
        number = node._sequence_nr()
        if number <= after or _base(node) == "accumulategrad":
            continue
        names[_base(node)] += 1
        new = [following for following, _ in node.next_functions if following is not None and following not in seen]
        seen.update(new)
        waiting += new
    found = [name for name in names if name not in _MAKES_NOTHING]
    return sorted(found, key=lambda name: _OFTEN.index(name) if name in _OFTEN else len(_OFTEN))


def leaves_of(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the tensors that a backward pass from outputs accumulates gradients in, those near the outputs first."""
    waiting = deque(output.grad_fn for output in outputs if output.grad_fn is not None)
    seen, leaves = set(waiting), []
    while waiting:
        node = waiting.popleft()
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        new = [following for following, _ in node.next_functions if following is not None and following not in seen]
        seen.update(new)
        waiting += new
    return leaves


def passed_through(outputs: Sequence[torch.Tensor]) -> frozenset[int]:
    """Returns the positions of outputs that others of them were made of: logits beside the loss, cached keys."""
    places = {(item.grad_fn, item.output_nr): at for at, item in enumerate(outputs) if item.grad_fn is not None}
    if len(places) < 2:
        return frozenset()
    waiting: list[Any] = [node for node, _ in places]
    seen, edges = set(waiting), set[tuple[Any, int]]()
    while waiting:
        following: list[tuple[Any, int]] = [edge for edge in waiting.pop().next_functions if edge[0] is not None]
        edges.update(edge for edge in following if edge in places)
        new = {node for node, _ in following} - seen
        seen |= new
        waiting += new
    return frozenset(places[edge] for edge in edges)


def node_number(tensor: torch.Tensor) -> int | None:
    """Returns the number of the node that made a tensor; None without one."""
    return None if tensor.grad_fn is None else int(tensor.grad_fn._sequence_nr())


def _base(node: Any) -> str:
    """The name of a node without its end: "div" for DivBackward0."""
    name = node.name().rpartition("::")[2]
    return re.sub(r"backward\d*$", "", name.lower())
