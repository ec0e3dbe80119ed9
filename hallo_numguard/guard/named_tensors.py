"""Names and positions of the tensors that the kernels scan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from hallo_numguard.core.records import Offender
from hallo_numguard.guard import readable
from hallo_numguard.guard.parameter_stats import ParameterStats, Piece, by_parameter
from hallo_numguard.guard.tensor_parts import Shard, in_whole_tensors
from hallo_numguard.ops.formats import dtype_name
from hallo_numguard.ops.layout import unravel
from hallo_numguard.ops.table import StatsTable


@dataclass(frozen=True)
class NamedTensor:
    """A tensor of the model, with all of its names.

    Attributes:
        kind: "parameter", "buffer", "input", "activation" or "loss".
        name: Fully qualified name.
        tensor: The tensor itself.
        aliases: Other names of the tensor (tied weights).
        shape: Shape of the whole tensor. Default: that of `tensor`.
        slice: Returns this rank's slice of it and its place in the whole tensor: `Piece.start`, and `Piece.run` and
            `Piece.stride` where it is a block of columns. None where this rank holds all of it.
        shard: Where `tensor` lies in the whole one, if model parallelism has cut it; a slice is then one of that part.
        is_everywhere: Whether all ranks hold it, or a part of it; `tensor` is empty on those that do not.
        is_on_disk: Whether it is in memory only while its module is called; `slice` then returns no element.
    """

    kind: str
    name: str
    tensor: torch.Tensor
    aliases: tuple[str, ...] = ()
    shape: tuple[int, ...] | None = None
    slice: Callable[[], tuple[torch.Tensor, int] | tuple[torch.Tensor, int, int, int]] | None = None
    shard: Shard | None = None
    is_everywhere: bool = True
    is_on_disk: bool = False

    @property
    def is_shared_out(self) -> bool:
        """Whether other ranks hold other elements of it, or another tensor in its place."""
        return self.slice is not None or self.shard is not None or not self.is_everywhere

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor; () of one that has no shape yet, or that is nested."""
        if self.shape is not None:
            return self.shape
        return () if self.tensor.is_nested or is_lazy(self.tensor) else tuple(self.tensor.shape)

    def held(self) -> tuple[torch.Tensor, int] | tuple[torch.Tensor, int, int, int]:
        """Returns this rank's part of it, and its place in the whole tensor as in `slice`."""
        return (self.tensor, 0) if self.slice is None else self.slice()

    def offender(self, stats: ParameterStats, position: int, rank: int | None) -> Offender:
        """Returns this tensor (or its gradient, of the same shape) as an offender."""
        nan, pos_inf, neg_inf = stats.counts[position].tolist()
        shape = self.whole_shape
        return Offender(
            kind=self.kind,
            name=self.name,
            module=self.name.rpartition(".")[0] if self.kind in ("parameter", "buffer") else "",
            rank=rank,
            index=unravel(int(stats.first[position]), shape),
            nan=nan,
            pos_inf=pos_inf,
            neg_inf=neg_inf,
            absmax=float(stats.absmax[position]),
            numel=math.prod(shape),
            shape=shape,
            dtype=dtype_name(self.tensor.dtype),
            aliases=self.aliases,
        )


def named_parameters(model: nn.Module) -> list[NamedTensor]:
    """Returns the parameters in registration order, tied ones once."""
    return _unique("parameter", model.named_parameters(remove_duplicate=False))


def named_buffers(model: nn.Module) -> list[NamedTensor]:
    """Returns the buffers of floating-point or complex numbers in registration order, shared ones once."""
    buffers = model.named_buffers(remove_duplicate=False)
    return _unique("buffer", ((name, value) for name, value in buffers if not readable.holds_integers(value)))


def is_persistent(model: nn.Module, buffer: torch.Tensor) -> bool:
    """Returns whether a state dict of the model has that buffer."""
    return any(
        value is buffer and name not in module._non_persistent_buffers_set
        for module in model.modules()
        for name, value in module._buffers.items()
    )


def _unique(kind: str, named: Iterable[tuple[str, torch.Tensor]]) -> list[NamedTensor]:
    names: dict[torch.Tensor, list[str]] = {}
    for name, tensor in named:
        names.setdefault(tensor, []).append(name)
    return [NamedTensor(kind, first, tensor, tuple(others)) for tensor, (first, *others) in names.items()]


def scan_tensors(tensors: Sequence[NamedTensor]) -> ParameterStats:
    """Scans this rank's part of each tensor in one pass; what cannot be read counts as finite."""
    held = [item.held() for item in tensors]
    found = readable.scan([tensor for tensor, *_ in held])
    pieces = [Piece(owner, *held[owner][1:]) for owner in found.owners]
    return stats_of(tensors, found.table, pieces)


def stats_of(tensors: Sequence[NamedTensor], table: StatsTable, pieces: Sequence[Piece]) -> ParameterStats:
    """Adds up the records of segments by tensor, with indices in the whole tensors; see `by_parameter`."""
    return in_whole_tensors(by_parameter(table, pieces, len(tensors)), [item.shard for item in tensors])


def stats_as_seen(item: NamedTensor, counts: Sequence[int], index: int) -> ParameterStats:
    """Returns the statistics of a tensor that was seen not finite, and may have been overwritten since.

    Args:
        item: The tensor.
        counts: How many NaN, +Inf and -Inf this rank's part of it had.
        index: Flat index in that part of the first of them.
    """
    stats = ParameterStats(torch.tensor([list(counts)]), torch.tensor([index]), torch.zeros(1, dtype=torch.float64))
    _, *place = item.held()
    return in_whole_tensors(in_whole_tensors(stats, [Shard(*place)]), [item.shard])


class ToleratedNonfinites:
    """Remembers non-finite tensors that were there in a clean step: they do not cause later failures.

    An embedding row that is never read may be NaN for ever, an attention mask holds -Inf on purpose. What changed since
    is suspect again.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, ...]] = {}
        self._tolerated: dict[int, tuple[int, ...]] = {}

    def note(self, stats: ParameterStats) -> None:
        """Remembers what is not finite now."""
        self._seen = {position: _signature(stats, position) for position in stats.bad_positions()}

    def clean_step(self) -> None:
        """Tolerates everything noted so far: a step was finite with it."""
        if self._seen:
            self._tolerated.update(self._seen)
            self._seen = {}

    def is_tolerated(self, stats: ParameterStats, position: int) -> bool:
        """Returns whether this tensor is as it was in a clean step."""
        return self._tolerated.get(position) == _signature(stats, position)


def _signature(stats: ParameterStats, position: int) -> tuple[int, ...]:
    return (*stats.counts[position].tolist(), int(stats.first[position]))


@dataclass
class ReadyOrder:
    """Learns in which order gradients become ready, from the first backward pass; then costs nothing.

    Attributes:
        rank_of: Place in that order, by position of the parameter. Parameters that took no part are missing.
    """

    rank_of: dict[int, int] = field(default_factory=dict)
    _handles: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)

    def learn(self, parameters: Sequence[NamedTensor]) -> None:
        """Hooks every parameter that takes gradients, until `stop` is called."""
        for position, item in enumerate(parameters):
            if item.tensor.requires_grad and item.tensor.is_leaf and not is_lazy(item.tensor):
                self._handles.append(item.tensor.register_post_accumulate_grad_hook(self._recorder(position)))

    def stop(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def sort(self, positions: Iterable[int]) -> list[int]:
        """Returns the positions, earliest gradient first; unknown ones last, from the model's end."""
        last = len(self.rank_of)
        return sorted(positions, key=lambda position: (self.rank_of.get(position, last), -position))

    def _recorder(self, position: int) -> Callable[[torch.Tensor], None]:
        def ready(_: torch.Tensor) -> None:
            self.rank_of.setdefault(position, len(self.rank_of))

        return ready
