"""The floating-point numbers inside of any tensor, for the kernels, which read plain dense tensors only.

| tensor | what is read |
|---|---|
| sparse (COO, CSR, CSC, BSR, BSC) | its values, those of the same place added up |
| complex | its real and imaginary parts |
| subclass that is a plain tensor inside | the plain tensor |
| wrapper subclass (`__tensor_flatten__`) | the floating-point tensors inside: of quantized numbers the scales |
| integers of a subclass that holds their scales as attributes | those |
| nested | its components |

Nothing is dequantized. What holds no floating-point number, or none that can be reached, is left out of scans, and
named once (`UncheckedTensors`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import _python_dispatch

from hallo_numguard.core.findings import Finding
from hallo_numguard.core.safe_text import listed
from hallo_numguard.ops.api import multi_tensor_stats
from hallo_numguard.ops.formats import dtype_name
from hallo_numguard.ops.table import StatsTable
from hallo_numguard.tracing import nested

Place = Callable[[torch.Tensor], torch.Tensor]
"""Flat index in a tensor, from that in the numbers inside of it; 0-dim int64 both."""

MAX_DEPTH = 4  # of tensors inside of tensors
HOLDS_INTEGERS = "they hold integers"
NOT_INITIALIZED = "they are not initialized yet"

_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


class Numbers(NamedTuple):
    """Floating-point numbers inside of a tensor.

    Attributes:
        values: Plain dense tensor of a dtype that the kernels read.
        place: Where each stands in the whole tensor; None if `values` is the whole tensor. A scale stands for the first
            of the numbers that it scales.
    """

    values: torch.Tensor
    place: Place | None = None


class Scan(NamedTuple):
    """One pass over the numbers inside of tensors.

    Attributes:
        table: Statistics; indices are those of the whole tensors.
        owners: Position of the tensor behind each row. A tensor may have several rows, or none.
        unread: Positions of the tensors without a row.
    """

    table: StatsTable
    owners: Sequence[int]
    unread: Sequence[int]


def is_plain(tensor: torch.Tensor) -> bool:
    """Returns whether the kernels can read a tensor as it is."""
    return type(tensor) in (torch.Tensor, nn.Parameter) and nested.is_readable(tensor) and not tensor.is_nested


def is_wrapper(tensor: Any) -> bool:
    """Returns whether a tensor is of a class that wraps others, and names them by `__tensor_flatten__`."""
    return _python_dispatch.is_traceable_wrapper_subclass(tensor)


def scan(tensors: Sequence[torch.Tensor]) -> Scan:
    """Reads the numbers inside of tensors, each once. No host sync but that of `coalesce`, for sparse ones."""
    if all(map(is_plain, tensors)):
        return Scan(multi_tensor_stats([tensor.detach() for tensor in tensors]), range(len(tensors)), ())
    found = [numbers_in(tensor) for tensor in tensors]
    flat = [(owner, numbers) for owner, inside in enumerate(found) for numbers in inside]
    table = multi_tensor_stats([numbers.values for _, numbers in flat])
    for row, (_, numbers) in enumerate(flat):
        if numbers.place is not None and numbers.values.numel() > 0:
            first = table.first_nonfinite[row]
            first.copy_(torch.where(first >= 0, numbers.place(first.clamp(min=0)), first))
    return Scan(table, [owner for owner, _ in flat], [owner for owner, inside in enumerate(found) if not inside])


class Reader:
    """Scans lists of tensors whose kinds rarely change: no Python code for each, as long as the kernels take them all.

    Attributes:
        are_plain: Whether all tensors were plain so far. To be set where their kinds are known to have changed.
    """

    def __init__(self) -> None:
        self.are_plain = True

    def scan(self, tensors: Sequence[torch.Tensor]) -> Scan:
        """Does what the function `scan` does."""
        if self.are_plain:
            try:
                return Scan(multi_tensor_stats(tensors), range(len(tensors)), ())
            except Exception:  # whatever a subclass or a layout raises that was not there before
                self.are_plain = all(map(is_plain, tensors))
                if self.are_plain:
                    raise
        return scan(tensors)


def numbers_in(tensor: torch.Tensor) -> list[Numbers]:
    """Returns the floating-point numbers inside of a tensor; [] if there are none, or none that can be read."""
    try:
        return list(_numbers_in(tensor, MAX_DEPTH))
    except Exception:  # noqa: BLE001 - a subclass's own code, or a layout that torch itself cannot convert
        return []


def _numbers_in(tensor: Any, depth: int) -> Iterator[Numbers]:
    if is_plain(tensor):
        yield Numbers(tensor.detach())
    elif depth == 0 or tensor.is_meta or is_lazy(tensor):
        return
    elif hasattr(tensor, "trigger_wait"):  # AsyncCollectiveTensor: what it holds may not have arrived
        yield from _numbers_in(tensor.trigger_wait(), depth - 1)
    elif is_wrapper(tensor):
        names, _ = tensor.__tensor_flatten__()
        inside = [getattr(tensor, name) for name in names]
        yield from _spread(tensor, [part for part in inside if isinstance(part, torch.Tensor)], depth)
    elif type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__:
        yield from _numbers_in_memory(tensor, depth)


def _numbers_in_memory(tensor: torch.Tensor, depth: int) -> Iterator[Numbers]:
    """The numbers of a tensor with memory of its own, of whatever class."""
    if tensor.layout in _COMPRESSED:
        tensor = tensor.detach().to_sparse(layout=torch.sparse_coo)
    if tensor.layout is torch.sparse_coo:
        yield from _numbers_of_sparse(tensor.detach().coalesce(), depth)
    elif tensor.is_nested:
        start = 0
        for part in tensor.detach().unbind():
            for numbers in _numbers_in(part, depth - 1):
                yield Numbers(numbers.values, _after(numbers.place, _line(1, start)))
            start += part.numel()
    elif tensor.is_complex():
        pairs = torch.view_as_real(nested.as_plain(tensor).resolve_conj())
        yield from (Numbers(numbers.values, lambda index: index // 2) for numbers in _numbers_in(pairs, depth - 1))
    elif tensor.is_floating_point():
        yield from _numbers_in(nested.as_plain(tensor), 0)
    elif type(tensor) not in (torch.Tensor, nn.Parameter):
        yield from _spread(tensor, list(_attached(vars(tensor).values(), 2)), depth)


def _numbers_of_sparse(tensor: torch.Tensor, depth: int) -> Iterator[Numbers]:
    """The values of a coalesced tensor, in the order of their places."""
    values, indices = tensor.values(), tensor.indices()
    row_size = math.prod(values.shape[1:])
    strides = [math.prod(tensor.shape[dimension + 1 :]) for dimension in range(tensor.sparse_dim())]
    starts = (indices * torch.tensor(strides, device=indices.device)[:, None]).sum(dim=0)

    def place(index: torch.Tensor) -> torch.Tensor:
        return starts.to(index.device)[index // row_size] + index % row_size

    for numbers in _numbers_in(values, depth - 1):
        yield Numbers(numbers.values, _after(numbers.place, place))


def _spread(whole: torch.Tensor, inside: Sequence[torch.Tensor], depth: int) -> Iterator[Numbers]:
    """The numbers of tensors inside of a tensor: one each of its elements, or one for several that are adjacent."""
    for part in inside:
        each, rest = divmod(whole.numel(), max(1, part.numel()))
        step = 0 if rest else each
        for numbers in _numbers_in(part, depth - 1):
            yield Numbers(numbers.values, _after(numbers.place, _line(step)))


def _line(step: int, start: int = 0) -> Place:
    return lambda index: index * step + start


def _after(inner: Place | None, outer: Place) -> Place:
    return outer if inner is None else lambda index: outer(inner(index))


def _attached(values: Iterable[Any], depth: int) -> Iterator[torch.Tensor]:
    """The floating-point tensors among the attributes of a tensor, and of objects there."""
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.is_floating_point():
                yield value
        elif depth and hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)) and not callable(value):
            yield from _attached(vars(value).values(), depth - 1)


def norm_by_torch(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the L2 norm of a tensor of any kind: 0-dim float64 on its device, 0 if torch has none.

    The one norm of what the kernels cannot read, or read in part: that of scales is not that of what they scale.
    """
    numbers = [] if is_wrapper(tensor) else numbers_in(tensor)
    if numbers:
        norms = [torch.linalg.vector_norm(part.values, dtype=torch.float64) for part in numbers]
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    try:
        norm = float(torch.linalg.vector_norm(tensor.detach()))  # by the subclass's own code; synchronises
    except Exception:  # noqa: BLE001 - as in numbers_in
        norm = 0.0
    return torch.tensor(norm, dtype=torch.float64, device=tensor.device)


def readable_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors that hold floating-point numbers, or may; nested tensors by component."""
    for path, tensor in named:
        if is_plain(tensor):
            yield path, tensor
        elif tensor.is_nested and tensor.layout is torch.jagged:
            yield f"{path}.values()", tensor.values()  # its components have no place without a host sync
        elif tensor.is_nested:
            yield from ((f"{path}[{place}]", part) for place, part in enumerate(tensor.unbind()))
        elif hasattr(tensor, "to_local") and hasattr(tensor, "placements"):
            yield f"{path}.to_local()", tensor.to_local()
        elif not holds_integers(tensor):
            yield path, tensor


def reason_unread(tensor: torch.Tensor) -> str:
    """Returns why nothing inside of a tensor is read, as the end of a sentence on several of its kind."""
    if tensor.is_meta:
        return "they are on the meta device, without data"
    if is_lazy(tensor):
        return NOT_INITIALIZED
    if holds_integers(tensor):
        return HOLDS_INTEGERS
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        return f"a {type(tensor).__name__} shows no floating-point tensor inside"
    if tensor.layout is not torch.strided:
        return f"their layout is {tensor.layout}"
    return f"no kernel reads {dtype_name(tensor.dtype)}"


def holds_integers(tensor: torch.Tensor) -> bool:
    """Returns whether the elements are integers, booleans or quantized numbers."""
    return not (tensor.is_floating_point() or tensor.is_complex())


class UncheckedTensors:
    """Tensors that scans leave out. Each is named in one finding, and never again."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._fresh: dict[str, list[str]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def add(self, name: str, tensor: torch.Tensor, reason: str | None = None) -> None:
        """Adds a tensor inside of which nothing is read, by default for `reason_unread`."""
        if name not in self._known:
            self._known.add(name)
            self._fresh.setdefault(reason or reason_unread(tensor), []).append(name)

    def add_if_unread(self, name: str, tensor: torch.Tensor) -> bool:
        """Adds a tensor if nothing inside of it is read; returns whether that is so."""
        is_unread = not is_plain(tensor) and not numbers_in(tensor)
        if is_unread:
            self.add(name, tensor)
        return is_unread

    def finding(self) -> Finding | None:
        """Returns the finding on what was added since the last; None if nothing was.

        Integers cannot go non-finite, and lazy parameters are read later: they alone are no more than an information.
        """
        if not self._fresh:
            return None
        severity = "info" if set(self._fresh) <= {HOLDS_INTEGERS, NOT_INITIALIZED} else "warning"
        message = "; ".join(_not_checked(names, reason) for reason, names in self._fresh.items())
        self._fresh = {}
        return Finding("not_checked", message, severity=severity)


def _not_checked(names: Sequence[str], reason: str) -> str:
    count = "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"
    return f"{count} not checked, because {reason}: {listed(names)}"
