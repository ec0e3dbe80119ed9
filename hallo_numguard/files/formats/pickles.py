"""Pickles without their code: tensors become descriptions of where they lie, every foreign object becomes inert.

Two passes. `_screen` walks through the opcodes by the tables of `pickletools` and refuses what would take memory, time
or depth that the data does not have (a memo index of a billion, tuples of tuples that double forty times). Then the
unpickler of the standard library runs, with a `find_class` that knows a list of stand-ins and makes an empty class for
every other name: nothing that a file names is ever imported.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hallo_numguard.files.formats.source import DamagedFile

_MOST_DEPTH = 500
_MOST_OPCODES = 5_000_000
_LEAST_WORK, _WORK_A_BYTE = 1_000_000, 128  # that a pickle may ask for, see `_screen`
_GROWS = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}  # change what lies below their arguments
_MOST_COPIED = 1_000_000  # values of metadata
_CODE_REMEDY = (
    "Do not load this file with torch.load(weights_only=False) or pickle unless you trust whoever wrote it; "
    "ask for the weights as safetensors."
)


class _Sealed:
    """What a pickle cannot change: it may give a state to any object that it has found, and ours are shared."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state for an object that has none")


@dataclass(frozen=True)
class StorageType(_Sealed):
    """What a storage class, or a dtype, stands for."""

    dtype: torch.dtype


@dataclass(frozen=True)
class StoredBytes(_Sealed):
    """A storage: a run of bytes in an archive, by its key."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class StoredTensor(_Sealed):
    """A tensor as the pickle describes it. `offset` and `stride` are in elements of `dtype`."""

    storage: StoredBytes
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Inert:
    """Stands for an object of a class that is not ours: keeps what it was made of, does nothing."""

    qualified = ""
    args: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __new__(cls, *args: Any, **_: Any) -> Inert:
        """Takes any arguments and keeps them."""
        made = super().__new__(cls)
        made.__dict__.update(args=args, state={}, items=[])
        return made

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__dict__["items"].append((key, value))

    def append(self, value: Any) -> None:
        """As a list would."""
        self.__dict__["items"].append(value)

    def extend(self, values: Any) -> None:
        """As a list would."""
        self.__dict__["items"].extend(values)


@dataclass
class Unpickled:
    """What a pickle holds.

    Attributes:
        value: Containers, numbers, strings, `StoredTensor` and `Inert`.
        foreign: Names of all classes and functions that it would have imported.
    """

    value: Any
    foreign: set[str] = field(default_factory=set)


def unpickle(data: bytes) -> Unpickled:
    """Returns what a pickle holds. Memory and time grow with its length, and with nothing that it says.

    Raises:
        DamagedFile: If it is no whole pickle, or one that is built to exhaust memory.
    """
    reader = _Unpickler(io.BytesIO(data))
    try:
        _screen(data)
        value = reader.load()
    except DamagedFile:
        raise
    except Exception as error:  # noqa: BLE001 - hostile opcodes raise anything at all in the standard library
        raise DamagedFile(f"holds a pickle that is damaged ({type(error).__name__})") from None
    return Unpickled(value, reader.foreign)


def refusal(name: str) -> DamagedFile | None:
    """Returns what to say of a name that a pickle would import, if it is not one of plain data."""
    if name.startswith(_DATA_MODULES) or name in _DATA_NAMES:
        return None
    return DamagedFile(f"holds a pickle that would run code: {name}", kind="code", remedy=_CODE_REMEDY)


def inert(value: Any) -> Any:
    """Returns a value of dicts, lists, numbers and strings: for metadata.

    What is a tensor, more than 20 deep or after the first million of values becomes None.
    """
    return _Copy().of(value, 20)


class _Copy:
    """Copies values of containers that may refer to the same one again and again."""

    def __init__(self) -> None:
        self._left = _MOST_COPIED

    def of(self, value: Any, depth: int) -> Any:
        """Returns the copy of one value."""
        self._left -= 1
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if depth == 0 or self._left < 0:
            return None
        if isinstance(value, Inert):
            state = value.state or value.args
            return self.of(state[0] if isinstance(state, tuple) and len(state) == 1 else state, depth - 1)
        if isinstance(value, Mapping):
            return {key: self.of(item, depth - 1) for key, item in value.items() if isinstance(key, (str, int))}
        if isinstance(value, (list, tuple)):
            return [self.of(item, depth - 1) for item in value]
        return str(value.dtype) if isinstance(value, StorageType) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.foreign: set[str] = set()
        self._classes: dict[str, type[Inert]] = {}
        self._member = _Call(self._member_of)

    def find_class(self, module: str, name: str) -> Any:
        """Returns our stand-in, or an empty class that is called so."""
        qualified = f"{_RENAMED.get(module, module)}.{name}"
        known = self._member if qualified == "builtins.getattr" else _KNOWN.get(qualified)
        if known is not None:
            return known
        self.foreign.add(qualified)
        if qualified not in self._classes:
            self._classes[qualified] = type("Foreign", (Inert,), {"qualified": qualified})
        return self._classes[qualified]

    def _member_of(self, cls: Any, name: Any, *_: Any) -> Inert:
        """How Python 3.11.0 to 3.11.3 write a member of an enumeration; of anything else, it leads to code."""
        qualified = getattr(cls, "qualified", "")
        if qualified not in _ENUMERATIONS:
            self.foreign.add("builtins.getattr")
        return Inert(name)

    def persistent_load(self, reference: Any) -> StoredBytes:
        """Returns the storage that torch refers to."""
        _, storage, key, _, numel = reference[:5]
        if not (isinstance(storage, StorageType) and isinstance(key, str) and isinstance(numel, int)):
            raise pickle.UnpicklingError("no reference to a storage")
        return StoredBytes(key, storage.dtype, numel)


@dataclass(eq=False)
class _Node:
    """Stands for an object: how deep it is, and how much it holds, with every repetition counted."""

    depth: int
    weight: int


_MARK = _Node(0, 0)


def _screen(data: bytes) -> None:
    """Runs the pickle on nodes in place of objects.

    Work is what every opcode takes as arguments: bytes of text and objects. It bounds memory, and the time that it
    takes to hash keys, which may be tuples of tuples.
    """
    stack: list[_Node] = []
    memo: dict[int, _Node] = {}
    left = _WORK_A_BYTE * len(data) + _LEAST_WORK
    for count, (opcode, value, _) in enumerate(pickletools.genops(data)):
        name = opcode.name
        argument = value if isinstance(value, int) else 0
        if name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            if argument > len(data):
                raise DamagedFile("holds a pickle that asks for more memory than it fills")
            memo[argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "POP":
            stack.pop()
        else:
            left -= _apply(opcode, len(value) if isinstance(value, (str, bytes, bytearray)) else 0, stack)
        if left < 0 or count > _MOST_OPCODES:
            raise DamagedFile("holds a pickle that unfolds to far more than what weights need")


def _apply(opcode: pickletools.OpcodeInfo, length: int, stack: list[_Node]) -> int:
    """Takes an opcode's arguments from the stack and puts there what it makes; returns the work."""
    taken: list[_Node] = []
    before = opcode.stack_before
    if pickletools.markobject in before:
        while (item := stack.pop()) is not _MARK:
            taken.append(item)
        before = before[: before.index(pickletools.markobject)]
    taken.extend(stack.pop() for _ in before)
    if _MARK in taken:
        raise ValueError("a mark where an object should be")
    container = taken.pop() if opcode.name in _GROWS else _Node(0, length)
    work = 1 + sum(node.weight for node in taken)
    container.weight += work
    container.depth = max([container.depth, *(1 + node.depth for node in taken)])
    if container.depth > _MOST_DEPTH:
        raise DamagedFile("holds a pickle that is nested far deeper than weights need")
    stack.extend(container for _ in opcode.stack_after)
    return work + length


@dataclass(frozen=True)
class _Call(_Sealed):
    """A function that a pickle may call."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


def _rebuild_tensor(storage: StoredBytes, offset: int, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    return _tensor(storage, storage.dtype, offset, shape, stride)


def _rebuild_tensor_v3(
    storage: StoredBytes, offset: int, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> StoredTensor:
    return _tensor(storage, dtype.dtype, offset, shape, stride)


def _tensor(storage: StoredBytes, dtype: torch.dtype, offset: int, shape: Any, stride: Any) -> StoredTensor:
    shape, stride = tuple(shape), tuple(stride)
    numbers = (offset, *shape, *stride)
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in numbers) or len(shape) != len(stride):
        raise pickle.UnpicklingError("a tensor of impossible size")
    if len(shape) > _MOST_DIMENSIONS or not isinstance(storage, StoredBytes):
        raise pickle.UnpicklingError("no tensor")
    return StoredTensor(storage, dtype, offset, shape, stride)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _rebuild_from_type(function: Any, _kind: Any, args: Any, _state: Any = None) -> Any:
    return function(*args)


def _reconstruct(cls: Any, *_: Any) -> Any:
    return cls() if isinstance(cls, type) and issubclass(cls, Inert) else None


def _encode(text: Any, *_: Any) -> Any:
    """How protocol 2 writes bytes. The text is kept as it is: a copy for every call would fill the memory."""
    return text


_MOST_DIMENSIONS = 64
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # as protocol 2 calls them
_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}
_KNOWN: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": _Call(lambda *_: {}),
    "collections.Counter": _Call(dict),
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.dict": dict,
    "builtins.list": list,
    "builtins.tuple": tuple,
    "builtins.complex": complex,
    "_codecs.encode": _Call(_encode),
    "copyreg._reconstructor": _Call(_reconstruct),
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": _Call(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v2": _Call(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v3": _Call(_rebuild_tensor_v3),
    "torch._utils._rebuild_parameter": _Call(_rebuild_parameter),
    "torch._utils._rebuild_parameter_with_state": _Call(_rebuild_parameter),
    "torch._tensor._rebuild_from_type_v2": _Call(_rebuild_from_type),
    "torch.storage.UntypedStorage": StorageType(torch.uint8),
    **{f"torch.{name}Storage": StorageType(dtype) for name, dtype in _STORAGES.items()},
    **{str(dtype): StorageType(dtype) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
}
_ENUMERATIONS = frozenset(
    {"deepspeed.runtime.zero.config.ZeroStageEnum", "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING"}
)
_DATA_NAMES = frozenset(
    {
        "argparse.Namespace",
        "builtins.bool",
        "builtins.bytearray",
        "builtins.float",
        "builtins.int",
        "builtins.object",
        "builtins.range",
        "builtins.slice",
        "builtins.str",
        "collections.deque",
        "datetime.date",
        "datetime.datetime",
        "datetime.timedelta",
        "numpy.dtype",
        "numpy.ndarray",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "pathlib.WindowsPath",
        "torch.Tensor",
        "torch.device",
        "torch.nn.parameter.Parameter",
        "torch.serialization._get_layout",
        "types.SimpleNamespace",
        "uuid.UUID",
    }
)
_DATA_MODULES = (  # of classes that hold settings or state
    "accelerate.utils.dataclasses.",
    "deepspeed.runtime.fp16.loss_scaler.",
    "deepspeed.runtime.zero.config.",
    "deepspeed.utils.tensor_fragment.",
    "torch.distributed.checkpoint.metadata.",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "transformers.trainer_pt_utils.",
    "transformers.trainer_utils.",
    "transformers.training_args.",
)
