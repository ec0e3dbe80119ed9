"""State of a model beside its parameters: buffers, random generators and plain attributes of its modules.

A call can only be repeated from the state that it began with. Saving all of that before every call would be slow, so
a `StateRecorder` finds out in a few calls what the model's forward pass changes at all, and saves only this in the
others.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import random
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from hallo_numguard.ops.device import AsyncHostCopy
from hallo_numguard.tracing.nested import Contents, is_generator, is_readable
from hallo_numguard.tracing.rng_and_autocast import RandomState

MAX_COPY_BYTES = 16 << 20  # of one tensor; of a larger one only the version is recorded
MAX_ITEMS = 256  # of a container
LEARNING_CALLS = 2  # first calls, and first ones after a change between training and evaluation
LEARNING_INTERVAL = 1024

_OWN_STATE = frozenset(nn.Module().__dict__) - {"training"}  # hooks, parameters, buffers, modules
_BOOKS_OF_FRAMEWORKS = ("ds_", "_ds_", "applied_pre_backward_ref_cnt")  # ZeRO stage 3
_PLAIN_TYPES = (bool, int, float, complex, str, bytes, type(None))
_CONTAINERS = (list, dict, set, deque)
_ABSENT = object()

Owner = MutableMapping[str, Any]
Slot = tuple[Owner, str]


# -- single values -----------------------------------------------------------------------------------------------------


class _Saved(ABC):
    """A value as it was.

    Attributes:
        value: The value itself.
    """

    value: Any

    @abstractmethod
    def restored(self) -> Any:
        """Returns the value, with the contents that it had."""

    @abstractmethod
    def is_same(self, value: Any) -> bool:
        """Returns whether `value` is the same, with the same contents. May synchronise."""

    def can_be_restored(self) -> bool:
        """Returns whether `restored` gives the contents that it had."""
        return True


class _Plain(_Saved):
    """A number, a text, a tuple of these; or `_ABSENT` for an attribute that was not there."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def restored(self) -> Any:
        return self.value

    def is_same(self, value: Any) -> bool:
        return value is self.value or (type(value) is type(self.value) and bool(value == self.value))


class _Container(_Saved):
    """A list, dict, set or deque, with the items that it held."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._copy = value.copy()

    def restored(self) -> Any:
        self.value.clear()
        if isinstance(self.value, (list, deque)):
            self.value.extend(self._copy)
        else:
            self.value.update(self._copy)
        return self.value

    def is_same(self, value: Any) -> bool:
        if value is not self.value or len(value) != len(self._copy):
            return False
        if isinstance(value, dict):
            return value.keys() == self._copy.keys() and _are_same(value.values(), self._copy.values())
        return value == self._copy if isinstance(value, set) else _are_same(value, self._copy)


def _are_same(left: Iterable[Any], right: Iterable[Any]) -> bool:
    return all(a is b or (isinstance(a, _PLAIN_TYPES) and a == b) for a, b in zip(left, right, strict=True))


class _Generator(_Saved):
    """A random number generator; also the module `random` or `numpy.random`, for its global one."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._state = _read_generator(value)

    def restored(self) -> Any:
        if hasattr(self.value, "setstate"):  # of Python
            self.value.setstate(self._state)
        elif hasattr(self.value, "set_state"):  # of torch, and of numpy
            self.value.set_state(self._state)
        else:  # of numpy, the newer kind
            self.value.bit_generator.state = self._state
        return self.value

    def is_same(self, value: Any) -> bool:
        return value is self.value and _as_bytes(_read_generator(value)) == _as_bytes(self._state)


def _read_generator(generator: Any) -> Any:
    if hasattr(generator, "getstate"):
        return generator.getstate()
    return generator.get_state() if hasattr(generator, "get_state") else generator.bit_generator.state


def _as_bytes(state: Any) -> bytes:
    return bytes(state.numpy()) if isinstance(state, torch.Tensor) else pickle.dumps(state)


class _LargeTensor(_Saved):
    """A tensor that takes too much memory to be copied: its version has to do."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value
        self._version = version_of(value)

    def restored(self) -> Any:
        return self.value

    def is_same(self, value: Any) -> bool:
        return value is self.value and version_of(value) == self._version

    def can_be_restored(self) -> bool:
        return version_of(self.value) == self._version


def version_of(tensor: torch.Tensor) -> int:
    """Returns the number of writes to a tensor; 0 where they are not counted."""
    return 0 if tensor.is_inference() else tensor._version


class _TensorGroup:
    """Tensor attributes and buffers of one device and dtype, which are copied with one launch."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = slots
        self.tensors: list[torch.Tensor] = [owner[key] for owner, key in slots]
        self._addresses = [tensor.data_ptr() for tensor in self.tensors]
        flats = [tensor.detach().view(-1) if tensor.is_contiguous() else None for tensor in self.tensors]
        self._views = [flat for flat in flats if flat is not None]

        self._sizes = [tensor.numel() for tensor in self.tensors]

    def is_current(self) -> bool:
        """Returns whether these are the tensors that the model holds now."""
        return all(
            tensor is owner.get(key) and tensor.data_ptr() == address and tensor.numel() == size
            for (owner, key), tensor, address, size in zip(
                self.slots, self.tensors, self._addresses, self._sizes, strict=True
            )
        )

    def copy(self) -> _Copies:
        """Copies their elements."""
        if len(self._views) == len(self.tensors):
            return _Copies(self, torch.cat(self._views))
        return _Copies(self, torch.cat([tensor.detach().reshape(-1) for tensor in self.tensors]))


class _Copies:
    """The elements that the tensors of a group had."""

    def __init__(self, group: _TensorGroup, flat: torch.Tensor) -> None:
        self._group = group
        self._shapes = [tensor.shape for tensor in group.tensors]  # calls may resize them
        self._flat = flat
        self.nbytes = flat.nbytes

    def items(self) -> Iterator[tuple[Owner, str, torch.Tensor, torch.Tensor]]:
        """Yields owner, key, the tensor, and the copy of its elements."""
        parts = self._flat.split([shape.numel() for shape in self._shapes])
        held = zip(self._group.slots, self._group.tensors, self._shapes, parts, strict=True)
        for (owner, key), tensor, shape, part in held:
            yield owner, key, tensor, part.view(shape)


def _groups_of(slots: Iterable[Slot]) -> list[_TensorGroup]:
    """Groups tensors, each of them once."""
    groups: dict[tuple[torch.device, torch.dtype], list[Slot]] = {}
    for owner, key in slots:
        tensor = owner[key]
        groups.setdefault((tensor.device, tensor.dtype), []).append((owner, key))
    return [_TensorGroup(group) for group in groups.values()]


def _saved(value: Any) -> _Saved | None:
    """A value of which no elements are copied, as it is now; None for kinds that are not kept."""
    if isinstance(value, torch.Tensor):
        return _LargeTensor(value) if _is_state(value) else None
    if isinstance(value, _PLAIN_TYPES) or value is _ABSENT:
        return _Plain(value)
    if isinstance(value, tuple):
        return _Plain(value) if all(isinstance(item, _PLAIN_TYPES) for item in value) else None
    if type(value) in _CONTAINERS:
        return _Container(value) if len(value) <= MAX_ITEMS else None
    return _Generator(value) if is_generator(value) or _is_global_generator(value) else None


def _is_state(tensor: torch.Tensor) -> bool:
    """Whether a tensor attribute is kept. A reference to one with a history would keep its whole graph alive."""
    if tensor.grad_fn is not None or isinstance(tensor, nn.Parameter):
        return False
    if tensor.is_floating_point():
        return is_readable(tensor)
    return type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_meta


# -- all that a model holds --------------------------------------------------------------------------------------------


class Snapshot:
    """State at one moment, to be set again.

    Args:
        slots: Attributes and buffers, as the dict that holds each and its key.
        others: Generators and containers, wherever they are held.
        whole: Whether large tensors are copied as well, and references kept to what cannot be copied.
        copies: Copies of more tensors.

    Attributes:
        nbytes: Size of the copies, in bytes.
    """

    def __init__(
        self,
        slots: Iterable[Slot],
        others: Iterable[Any] = (),
        whole: bool = False,
        copies: Sequence[_Copies] = (),
    ) -> None:
        self._slots: list[tuple[Owner, str, _Saved]] = []
        self._others = [saved for saved in map(_saved, others) if saved is not None]
        self._present: set[tuple[int, str]] = set()
        tensors: list[Slot] = []
        for owner, key in slots:
            value = owner.get(key, _ABSENT)
            self._present.add((id(owner), key))
            if _is_copied(value, whole):
                tensors.append((owner, key))
                continue
            saved = _saved(value) or (_Plain(value) if whole else None)
            if saved is not None:
                self._slots.append((owner, key, saved))
        self._copies = [*copies, *(group.copy() for group in _groups_of(tensors))]
        self.nbytes = sum(copy.nbytes for copy in self._copies)

    def _tensors(self) -> Iterator[tuple[Owner, str, torch.Tensor, torch.Tensor]]:
        return itertools.chain.from_iterable(copy.items() for copy in self._copies)

    def add_new(self, slots: Iterable[Slot]) -> None:
        """Notes that those of these attributes that were not given before were not there."""
        missing = [(owner, key) for owner, key in slots if (id(owner), key) not in self._present]
        self._slots += [(owner, key, _Plain(_ABSENT)) for owner, key in missing]

    def can_be_restored(self) -> bool:
        """Returns whether all of it is at hand: large tensors are not copied."""
        return all(saved.can_be_restored() for *_, saved in self._slots)

    def restore(self) -> None:
        """Sets the state."""
        for saved in self._others:
            saved.restored()
        for owner, key, tensor, copy in self._tensors():
            _write(tensor, copy)
            owner[key] = tensor
        for owner, key, saved in self._slots:
            value = saved.restored()
            if value is _ABSENT:
                owner.pop(key, None)
            else:
                owner[key] = value

    def changes(self) -> _Changes:
        """Compares attributes and buffers with what they are now; large ones count as changed. No host sync."""
        changed = [
            (owner, key)
            for owner, key, saved in self._slots
            if isinstance(saved, _LargeTensor) or not saved.is_same(owner.get(key, _ABSENT))
        ]
        asked: dict[torch.device, list[tuple[Slot, torch.Tensor]]] = {}
        for owner, key, tensor, copy in self._tensors():
            if owner.get(key) is not tensor or tensor.shape != copy.shape:
                changed.append((owner, key))
            elif tensor.device.type != "cpu":
                asked.setdefault(tensor.device, []).append(((owner, key), (tensor != copy).any()))
            elif not torch.equal(tensor, copy):
                changed.append((owner, key))
        return _Changes(changed, list(asked.values()))

    def is_same_elsewhere(self) -> bool:
        """Returns whether all generators and containers are as they were."""
        return all(saved.is_same(saved.value) for saved in self._others)

    def copy_of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Returns the elements that a tensor had; None if they were not copied."""
        return next((copy for *_, held, copy in self._tensors() if held is tensor), None)

    def restore_poisoned(self) -> list[Slot]:
        """Sets the buffers that were finite and are not now, with all else that their modules have changed.

        Returns:
            These buffers. Synchronises.
        """
        tensors = list(self._tensors())
        poisoned = [(owner, key) for owner, key, _, copy in tensors if _is_poisoned(copy, owner.get(key))]
        owners = {id(owner) for owner, _ in poisoned}
        for owner, key, tensor, copy in tensors:
            if id(owner) in owners:
                _write(tensor, copy)
                owner[key] = tensor
        return poisoned


class _Changes:
    """Attributes and buffers that have changed, as far as the device has answered.

    Args:
        known: Those of which that is known.
        asked: Those of one device each, with a flag there that says whether they have.
    """

    def __init__(self, known: list[Slot], asked: Sequence[Sequence[tuple[Slot, torch.Tensor]]]) -> None:
        self._known = known
        self._asked = [
            ([slot for slot, _ in some], AsyncHostCopy(torch.stack([flag for _, flag in some]))) for some in asked
        ]

    @property
    def arrived(self) -> bool:
        """Whether `slots` need not wait."""
        return all(flags.arrived for _, flags in self._asked)

    def slots(self) -> list[Slot]:
        """Returns them; waits if necessary."""
        answers = [zip(slots, flags.read().tolist(), strict=True) for slots, flags in self._asked]
        return [*self._known, *(slot for slot, changed in itertools.chain(*answers) if changed)]


def _write(tensor: torch.Tensor, copy: torch.Tensor) -> None:
    """Writes in a way that autograd does not count: graphs that are kept stay valid."""
    if tensor.shape == copy.shape:
        tensor.data.copy_(copy)
    else:
        tensor.data = copy.clone()


def _is_copied(value: Any, whole: bool) -> bool:
    return isinstance(value, torch.Tensor) and _is_state(value) and (whole or value.nbytes <= MAX_COPY_BYTES)


def _is_poisoned(before: torch.Tensor, now: Any) -> bool:
    if not isinstance(now, torch.Tensor) or not before.is_floating_point():
        return False
    return bool(before.isfinite().all()) and not bool(now.isfinite().all())


def _is_global_generator(value: Any) -> bool:
    return isinstance(value, ModuleType) and value.__name__ in ("random", "numpy.random")


def _global_generators() -> list[Any]:
    numpy_random = sys.modules.get("numpy.random")
    return [random] if numpy_random is None else [random, numpy_random]


def _slots_of(module: nn.Module) -> Iterator[Slot]:
    """Attributes and buffers of a module and of those inside of it."""
    for part in module.modules():
        for key in list(vars(part)):
            if key not in _OWN_STATE and not key.startswith(_BOOKS_OF_FRAMEWORKS):
                yield vars(part), key
        for key in list(part._buffers):
            yield part._buffers, key


class StateRecorder:
    """Saves, before each call of a model, what its forward pass changes.

    Args:
        module: The model.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._calls = 0
        self._learn_until = LEARNING_CALLS
        self._modes: set[bool] = set()  # training or not, as far as calls were seen
        self._volatile: dict[tuple[int, str], Slot] = {}
        self._groups: list[_TensorGroup] | None = None  # of the volatile tensors; None: to be found anew
        self._others: list[Slot] = []  # volatile, but no tensors that are copied
        self._draws = False  # from Python's or numpy's global generator
        self._learning: tuple[Snapshot, Snapshot] | None = None
        self._changes: _Changes | None = None  # of the last call to learn from, as long as they are not noted

    def before_call(self, arguments: Contents) -> Snapshot:
        """Saves the state that a call begins with.

        Args:
            arguments: Contents of the call's arguments.

        Cost: a copy of what earlier calls have changed; in a few calls, one of all buffers.
        """
        if self._module.training not in self._modes:
            self._modes.add(self._module.training)
            self._learn_until = self._calls + LEARNING_CALLS
        self._calls += 1
        self._note_changes()
        others = [*arguments.containers, *arguments.generators]
        self._learning = None
        is_unknown = self._changes is not None
        if is_unknown or self._is_due():
            held = Snapshot(_slots_of(self._module), [*others, *_global_generators()])
            if not is_unknown:
                self._learning = held, Snapshot((), _global_generators())
            return held
        copies = [group.copy() for group in self._current_groups()]
        return Snapshot(self._others, [*others, *(_global_generators() if self._draws else ())], copies=copies)

    def _is_due(self) -> bool:
        """Whether this call is one to learn from: an early one, and rarely a later one."""
        is_power_of_two = self._calls & (self._calls - 1) == 0
        return self._calls <= self._learn_until or is_power_of_two or self._calls % LEARNING_INTERVAL == 0

    def _current_groups(self) -> list[_TensorGroup]:
        if self._groups is None or not all(group.is_current() for group in self._groups):
            present = [(owner, key) for owner, key in self._volatile.values() if key in owner]
            tensors = [(owner, key) for owner, key in present if _is_copied(owner[key], False)]
            copied = {(id(owner), key) for owner, key in tensors}
            self._groups = _groups_of(tensors)
            self._others = [slot for at, slot in self._volatile.items() if at not in copied]
        return self._groups

    def after_call(self) -> None:
        """Asks what the call has changed, if it is one to learn from. No host sync."""
        if self._learning is None:
            return
        (held, generators), self._learning = self._learning, None
        held.add_new(_slots_of(self._module))
        self._changes = held.changes()
        self._draws = self._draws or not generators.is_same_elsewhere()
        self._note_changes()

    def _note_changes(self) -> None:
        """Notes what a call has changed, once the device has answered."""
        if self._changes is None or not self._changes.arrived:
            return
        for owner, key in self._changes.slots():
            self._volatile[id(owner), key] = owner, key
        self._groups, self._changes = None, None


@contextlib.contextmanager
def state_restored(module: nn.Module, arguments: Contents) -> Iterator[None]:
    """Leaves a model, the arguments of a call, and all generators as they were, whatever happens inside."""
    others = [*arguments.containers, *arguments.generators, *_global_generators()]
    before, random_state = Snapshot(_slots_of(module), others, whole=True), RandomState.now()
    try:
        yield
    finally:
        before.add_new(_slots_of(module))
        before.restore()
        random_state.restore()
