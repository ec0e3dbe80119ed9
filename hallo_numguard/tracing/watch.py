"""Follows non-finite values from operation to operation, in forward pass, loss and backward pass alike.

Every operation's results are read. A non-finite result of finite arguments is a source; one of arguments that are not
finite has their source. Results keep it by their memory, so that a backward pass that uses a value of the forward pass
again (an Inf that `clamp` has made finite there) leads back to the operation that made it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from hallo_numguard.core.frames import TensorRecord
from hallo_numguard.core.records import Record
from hallo_numguard.core.sources import COMMUNICATION, WRITTEN_DOWN, Source
from hallo_numguard.ops.api import multi_tensor_stats
from hallo_numguard.ops.formats import dtype_name
from hallo_numguard.ops.layout import unravel
from hallo_numguard.tracing.code_lines import calling_line, is_our_work, is_recomputed, line_in_traceback
from hallo_numguard.tracing.explanations import Explanation, explain, large_arguments
from hallo_numguard.tracing.module_calls import ModuleCall, ModuleCalls
from hallo_numguard.tracing.nested import as_plain, batch_size_of, is_readable

_log = logging.getLogger("hallo_numguard")

NamedNow = Callable[[], Iterable[tuple[str, str, torch.Tensor]]]
"""Returns kind ("parameter", "buffer", "input", "gradient"), name and tensor of what an operation may be given."""

MAX_HIDDEN = 3  # operations that are listed, of those that made something finite of one source
_UNINITIALISED = frozenset(
    ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided", "resize_")
)
_OVERWRITES = frozenset(
    ("bernoulli_", "copy_", "exponential_", "fill_", "geometric_", "log_normal_", "normal_", "random_", "resize_")
) | {"set_", "uniform_", "zero_"}
_ADDS_UP = ("allreduce", "broadcast", "reduce_")
"""Beginnings of the names of collectives that are given what they write to; others overwrite it."""
_FILLS = frozenset(
    ("constant_pad_nd", "fill", "fill_", "full", "full_like", "index_fill", "index_fill_", "masked_fill")
) | {"masked_fill_", "new_full", "scalar_tensor", "scatter", "scatter_", "where"}
_WRITES_CONSTANTS = _FILLS | {"copy_", "index_put", "index_put_", "select_scatter"}
_CONSTANTS = frozenset(("full_like", "ones_like", "zeros_like", "new_zeros", "new_ones", "new_full")) | {
    "rand_like",
    "randint_like",
    "randn_like",
}
"""Operations that take nothing but the shape of their argument."""


PART = " (this rank's part of it)"
"""Ends the name of a tensor that is gathered to be the whole parameter."""


@dataclass(eq=False)
class _Found:
    """A source, while the pass goes on.

    Attributes:
        order: Number of earlier sources.
        is_legal: Whether it is -Inf that was written on purpose, as into a mask.
        source: The source as it was found.
        hidden_by: Operations that made something finite of it.
    """

    order: int
    is_legal: bool
    source: dict[str, Any]
    hidden_by: list[str] = field(default_factory=list)

    def as_source(self) -> Source:
        return Source(**self.source, hidden_by=tuple(self.hidden_by), is_fill=self.is_legal)


@dataclass(eq=False)
class _Operation:
    """One call of an operation.

    Attributes:
        func, args, kwargs: The operation and its arguments.
        given: Readable tensors among the arguments, but for what the operation overwrites.
        sources: Sources of those of them that are not finite, before the call.
        result: What it has returned.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    given: list[torch.Tensor] = field(default_factory=list)
    sources: list[_Found] = field(default_factory=list)
    result: Any = None

    @property
    def name(self) -> str:
        """Name without namespace and overload."""
        return str(self.func._schema.name.partition("::")[2])

    @property
    def is_of_weights(self) -> bool:
        """Whether it computes with something that gradients flow to, which no mask is made of."""
        values = tree_leaves((self.args, self.kwargs))
        return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)

    @property
    def is_communication(self) -> bool:
        """Whether it is a collective, or sends or receives."""
        return self.func.namespace in COMMUNICATION

    def read_arguments(self) -> list[torch.Tensor]:
        """Readable tensors among the arguments, but for what the operation overwrites."""
        overwrites = self.name in _OVERWRITES
        if self.is_communication:
            overwrites = self.func._schema.is_mutable and not self.name.startswith(_ADDS_UP)
        args = self.args[1:] if overwrites else self.args
        return _readable(tree_leaves((args, self.kwargs)))

    def written(self) -> list[torch.Tensor]:
        """Results, and arguments that were written to."""
        found = tree_leaves(self.result)
        if self.func._schema.is_mutable:
            for position, argument in enumerate(self.func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = self.args[position] if position < len(self.args) else self.kwargs.get(argument.name)
                    found += tree_leaves(value)
        return _readable(list({id(item): item for item in found}.values()))


class OperationWatch(TorchDispatchMode):
    """Finds where non-finite values come from, while it is on. It changes no result, and raises nothing of its own.

    Costs a launch, a host sync and some 100 us for each operation.

    Args:
        calls: The modules of the model that are being called.
        named: Returns the tensors whose names are known, at the moment of the question.

    Attributes:
        skips_ours: Whether what the guard does by itself is left out, in a pass that is the user's.
    """

    def __init__(self, calls: ModuleCalls, named: NamedNow) -> None:
        super().__init__()
        self.skips_ours = False
        self.calls = calls
        self._named = named
        self._memory: dict[int, tuple[StorageWeakRef, _Found | None]] = {}  # None where it is finite
        self._received: dict[int, tuple[StorageWeakRef, _Found]] = {}  # by memory: what collectives have written
        self._collectives = 0
        self._sent: list[_Found] = []  # sources of what collectives were given
        self._found: list[_Found] = []
        self._in_backward: list[_Found] = []  # sources of what operations of the backward pass have returned
        self._has_failed = False

    def source_of(self, tensors: Sequence[Any]) -> Source | None:
        """Returns the earliest source of what is not finite in these tensors; None if they are finite."""
        found = self._sources_of(_readable(tensors))
        return self._hidden_cause(min(found, key=_place)).as_source() if found else None

    def source_of_gradients(self) -> Source | None:
        """Returns the earliest source of what operations of the backward pass have returned."""
        found = self._in_backward
        return self._hidden_cause(min(found, key=_place)).as_source() if found else None

    def source_of_sent(self) -> Source | None:
        """Returns the earliest source, on this rank, of what it has given to collectives."""
        sources = [found.as_source() for found in sorted(self._sent, key=_place)]
        return next((source for source in sources if not source.is_received), None)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view or self._has_failed or (self.skips_ours and is_our_work()):
            return func(*args, **kwargs)
        operation = _Operation(func, args, kwargs)
        self._contained(self._before, operation)
        operation.result = func(*args, **kwargs)
        self._contained(self._after, operation)
        return operation.result

    @classmethod
    @contextlib.contextmanager
    def on(cls, modules: Iterable[tuple[str, nn.Module]], named: NamedNow) -> Iterator[OperationWatch]:
        """Watches what is done inside. Autograd keeps the lines of the forward pass meanwhile, for the backward pass.

        Args:
            modules: Modules whose calls are told, with their names.
            named: See `OperationWatch`.
        """
        calls = ModuleCalls(modules)
        try:
            with torch.autograd.set_detect_anomaly(True, check_nan=False), cls(calls, named) as watch:
                yield watch
        finally:
            calls.stop()

    def _contained(self, work: Callable[[_Operation], None], operation: _Operation) -> None:
        if self._has_failed:
            return
        try:
            work(operation)
        except Exception:  # noqa: BLE001 - the user's pass goes on, unwatched
            self._has_failed = True
            _log.debug("operations are not watched any more", exc_info=True)

    def _before(self, operation: _Operation) -> None:
        operation.given = operation.read_arguments()
        operation.sources = self._sources_of(operation.given)

    def _after(self, operation: _Operation) -> None:
        written = operation.written()
        if operation.is_communication:
            self._note_received(operation, written)
            return
        bad = [] if operation.name in _UNINITIALISED else _nonfinite(written)
        if not bad:
            self._hide(operation)
        found = self._origin(operation, *bad[0]) if bad else None
        if found is not None and found not in self._in_backward and self._is_of_backward(found):
            self._in_backward.append(found)
        positions = {position for position, _ in bad}
        for position, tensor in enumerate(written):
            self._remember(tensor, found if position in positions else None)

    def _note_received(self, operation: _Operation, written: Sequence[torch.Tensor]) -> None:
        """Notes what a collective writes, which may go on: if it turns out not to be finite, other ranks gave it."""
        self._collectives += 1
        real = [found for found in operation.sources if not found.is_legal]
        if real:
            found = min(real, key=lambda source: source.order)
            self._sent.append(found)
        else:
            found = self._possible(**self._described(operation), explanation="it takes what other ranks give it, too")
        for tensor in (*written, *operation.given):
            self._memory.pop(_key(tensor), None)
            self._received[_key(tensor)] = StorageWeakRef(tensor.untyped_storage()), found

    def _described(self, operation: _Operation) -> dict[str, Any]:
        """The fields of a source that say which operation it is, and where it is called."""
        phase, node, line, call = self._where()
        return {
            "kind": "operation",
            "name": "",
            "operation": str(operation.func),
            "phase": phase,
            "node": node,
            "line": line,
            "module": None if call is None else call.name,
            "cls": "" if call is None else call.cls,
            "call": 0 if call is None else call.call,
        }

    @staticmethod
    def _is_of_backward(found: _Found) -> bool:
        """Whether the present operation is one of the backward pass, and not a mask that checkpointing makes again."""
        return torch._C._current_autograd_node() is not None and not (found.is_legal and is_recomputed())

    def _hide(self, operation: _Operation) -> None:
        """Notes that the operation made something finite of what was not."""
        if operation.name in _CONSTANTS | _UNINITIALISED or not _readable(tree_leaves(operation.result)):
            return
        for found in operation.sources:
            if not found.is_legal and len(found.hidden_by) < MAX_HIDDEN:
                phase, _, line, _ = self._where()
                if phase == "backward":
                    return
                text = f"{operation.func}" + (f" ({line})" if line else "")
                if text not in found.hidden_by:
                    found.hidden_by.append(text)

    def _origin(self, operation: _Operation, position: int, record: Record) -> _Found:
        """The source of what an operation has made: that of its arguments, or itself."""
        result = operation.written()[position]
        real = [found for found in operation.sources if not found.is_legal]
        is_written = bool(real) and operation.name in _WRITES_CONSTANTS and all(map(_is_constant, real))
        if real and not is_written:
            return min(real, key=lambda found: found.order)
        if operation.sources and not record.nan and not is_written:
            return operation.sources[0]
        tensor = _tensor_record("output" if position == 0 else f"output[{position}]", result, record)
        explanation = explain(operation.name, operation.args, operation.kwargs, result, tensor.index)
        if is_written:
            explanation = Explanation(WRITTEN_DOWN, is_singular=True)
        made = self._new(
            is_legal=not operation.sources and _is_written_on_purpose(operation, result, record),
            **self._described(operation),
            tensor=tensor,
            sample=None if self._is_of_weights_alone(operation) else self._sample(tensor),
            explanation=explanation.text,
            is_singular=explanation.is_singular,
            large=large_arguments(operation.given, self._name_of, result.dtype),
        )
        if operation.sources and not is_written:
            made.source["fill"] = _in_words(operation.sources[0])
        return made

    def _hidden_cause(self, found: _Found) -> _Found:
        """The source in the forward pass of that operation whose backward pass was the source, if there is one.

        The value of such an operation may have been hidden (by `where`, for example), and need not be read again by its
        backward pass, which fails for the same reason.
        """
        node, line = found.source["node"].lower(), found.source["line"]
        for earlier in self._found if node else ():
            is_same = earlier.source["line"] == line and node.startswith(_base_name(earlier.source["operation"]))
            if line is None:  # of torch's own modules, which several may be
                is_same &= all(earlier.source[key] == found.source[key] for key in ("module", "call"))
            if is_same and not earlier.is_legal and earlier.source["phase"] == "forward":
                return earlier
        return found

    def _new(self, is_legal: bool, **source: Any) -> _Found:
        found = self._possible(is_legal, **source)
        self._found.append(found)
        return found

    def _possible(self, is_legal: bool = False, **source: Any) -> _Found:
        """A source, if what comes of it turns out not to be finite."""
        return _Found(len(self._found), is_legal, {"collectives": self._collectives, **source})

    def _where(self) -> tuple[str, str, str | None, ModuleCall | None]:
        """Phase, autograd node, line and module of the present operation."""
        node: Any = torch._C._current_autograd_node()
        if node is None or is_recomputed():
            return "forward", "", calling_line(), self.calls.current
        line = line_in_traceback(node.metadata.get("traceback_") or ())
        return "backward", node.name(), line, self.calls.of_node(node._sequence_nr())

    def _sample(self, tensor: TensorRecord) -> int | None:
        size = batch_size_of([held for kind, _, held in self._named() if kind == "input"])
        has_samples = size is not None and tensor.shape[:1] == (size,)
        return tensor.index[0] if has_samples and tensor.index else None

    def _is_of_weights_alone(self, operation: _Operation) -> bool:
        """Whether the operation was given parameters and buffers, of which no row is a sample's."""
        kinds = {(self._name_of(tensor) or ("", ""))[0] for tensor in operation.given}
        return bool(kinds) and kinds <= {"parameter", "buffer"}

    # -- memory ------------------------------------------------------------------------------------------------------

    def _sources_of(self, tensors: Sequence[torch.Tensor]) -> list[_Found]:
        """Sources of those of the tensors that are not finite."""
        unknown, suspects = [], []
        for tensor in tensors:
            known = self._memory.get(_key(tensor))
            if known is None:
                unknown.append(tensor)
            elif known[1] is not None:
                suspects.append((tensor, known[1]))
        found = [source for tensor, source in suspects if _nonfinite([tensor])]  # views of bad memory may be finite
        bad = dict(_nonfinite(unknown))
        for position, tensor in enumerate(unknown):
            if position in bad:
                source = self._from_outside(tensor, bad[position])
                self._remember(tensor, source)
                found.append(source)
            else:
                self._remember(tensor, None)
        return found

    def _remember(self, tensor: torch.Tensor, found: _Found | None) -> None:
        if found is None and tensor.nbytes != tensor.untyped_storage().nbytes():
            return  # the rest of the memory may be another's
        self._memory[_key(tensor)] = StorageWeakRef(tensor.untyped_storage()), found

    def _from_outside(self, tensor: torch.Tensor, record: Record) -> _Found:
        """The source of a tensor that no operation of this pass has made."""
        holder = self._holder_of(tensor)
        _, received = self._received.get(_key(tensor), (None, None))
        if holder is None and received is not None:
            if "tensor" not in received.source:  # read for the first time
                received.source["tensor"] = _tensor_record("output", tensor, record)
                received.order = len(self._found)
                self._found.append(received)
            return received
        kind, name, whole = holder or ("outside", "", tensor)
        phase, _, line, call = self._where()
        of_whole = _nonfinite([whole])  # of which the operation may have been given a transposed view, or a part
        held = _tensor_record(name, whole, of_whole[0][1]) if of_whole else _tensor_record(name, tensor, record)
        return self._new(
            is_legal=_is_mask(tensor, record, kind),
            kind=kind,
            name=name,
            operation="",
            phase=phase,
            node="",
            line=line,
            module=None if call is None else call.name,
            cls="" if call is None else call.cls,
            call=0 if call is None else call.call,
            tensor=held,
            sample=self._sample(held) if kind in ("input", "outside") else None,
        )

    def _name_of(self, tensor: torch.Tensor) -> tuple[str, str] | None:
        """Kind and name of a tensor that has one, or of which it is a part."""
        holder = self._holder_of(tensor)
        return None if holder is None else holder[:2]

    def _holder_of(self, tensor: torch.Tensor) -> tuple[str, str, torch.Tensor] | None:
        """Kind and name of a tensor, or of that of which it is a part, and that tensor as a whole."""
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        for kind, name, held in self._named():
            here = held.data_ptr() if is_readable(held) else 0
            if here and here < end and begin < here + held.nbytes:
                return kind, name, held
        return None


def named_weights(module: nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yields kind, name and tensor of parameters and buffers, and of what is gathered in place of some.

    That is ZeRO++ hpZ's copy, and what has been read from NVMe, which no scan of the weights has seen.
    """
    for name, parameter in module.named_parameters():
        yield "parameter", name, parameter
        if is_on_nvme(parameter):
            yield "parameter", f"{name}{PART}", getattr(parameter, "ds_tensor")  # noqa: B009 - of DeepSpeed, not typed
        secondary = getattr(parameter, "ds_secondary_tensor", None)
        if secondary is not None:
            yield "parameter", f"{name} (this rank's part of its hpZ copy)", secondary
    yield from (("buffer", name, tensor) for name, tensor in module.named_buffers())


def is_on_nvme(parameter: Any) -> bool:
    """Returns whether a parameter of DeepSpeed is in memory only while its module is called; small ones stay there."""
    location = getattr(getattr(parameter, "ds_tensor", None), "final_location", None)
    return getattr(location, "value", location) == "nvme"


def unwatched() -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which no mode sees the operations."""
    return _disable_current_modes()


def _place(found: _Found) -> tuple[bool, int]:
    return found.is_legal, found.order


def _is_constant(found: _Found) -> bool:
    """Whether a source is a number that the code has written down, which torch makes a tensor of unseen."""
    return found.source["kind"] == "outside" and not found.source["name"] and not found.source["tensor"].shape


def _base_name(operation: str) -> str:
    """The name of an operation as that of its autograd node begins; a space if there is no operation."""
    return operation.split(".")[1].strip("_").replace("_", "") if "." in operation else " "


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _readable(values: Iterable[Any]) -> list[torch.Tensor]:
    held = [getattr(value, "_local_tensor", value) for value in values if isinstance(value, torch.Tensor)]
    return [as_plain(tensor) for tensor in held if is_readable(tensor) and tensor.numel()]


def _nonfinite(tensors: Sequence[torch.Tensor]) -> list[tuple[int, Record]]:
    """Positions and records of the tensors that are not finite. Synchronises."""
    if not tensors:
        return []
    table = multi_tensor_stats(tensors)
    if not bool(table.any_nonfinite()):
        return []
    return [(at, record) for at, record in enumerate(table.to_host()) if record.nonfinite]


def _tensor_record(name: str, tensor: torch.Tensor, record: Record) -> TensorRecord:
    shape = tuple(tensor.shape)
    return TensorRecord(name, shape, dtype_name(tensor.dtype), record, unravel(record.first_nonfinite, shape))


def _is_written_on_purpose(operation: _Operation, result: torch.Tensor, record: Record) -> bool:
    if record.nan or record.pos_inf:
        return False
    return operation.name in _FILLS or (not operation.is_of_weights and _is_mask(result, record, ""))


def _is_mask(tensor: torch.Tensor, record: Record, kind: str) -> bool:
    """Whether a tensor is an additive mask: -Inf, and beside it 0 and one large negative number at most.

    A single number, and a buffer, may also be where a minimum begins.
    """
    if record.nan:
        return False
    if tensor.numel() == 1 and kind in ("", "outside"):
        return kind == "outside"
    if record.pos_inf:
        return False
    finite = tensor[tensor.isfinite()]
    lowest = finite.min() if finite.numel() else None
    return lowest is None or bool(((finite == 0) | ((finite == lowest) & (finite < -1000))).all())


def _in_words(fill: _Found) -> str:
    """What has written an Inf on purpose."""
    source = Source(**fill.source)
    line = f" ({source.line})" if source.line and source.operation else ""
    return f"{source.operation or f'{source.kind} {source.name}'.strip()}{line}"
