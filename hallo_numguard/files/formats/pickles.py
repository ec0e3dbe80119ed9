"""Pickles without their code: tensors become descriptions of where they lie, other objects become plain containers.

Two passes. `_screen` walks through the opcodes with the tables of `pickletools` and refuses pickles that ask for more
memory, time or nesting than their size justifies (a memo index of a billion, tuples of tuples that double forty times).
Then the standard unpickler runs with a `find_class` that has a list of stand-ins and makes an empty class for every
other name: nothing that a file names is ever imported.
"""

from __future__ import annotations

import functools
import io
import pickle
import pickletools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats.source import DamagedFile

_MAX_NESTING = 500
_MAX_OPCODES = 5_000_000
_MAX_WORK, _MAX_WORK_PER_BYTE = 1_000_000, 128  # see `_screen`
_MUTATING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}  # opcodes that change a container
_MAX_METADATA_VALUES = 1_000_000
_MAX_METADATA_DEPTH = 20
_MAX_DIMENSIONS = 64
_MAX_NAMES = 5  # in a message
_CLASSES_REMEDY = "Nothing to do if you trust whoever wrote it: that import runs their code."
_CODE_REMEDY = (
    "Do not load this file with torch.load(weights_only=False) or pickle unless you trust whoever wrote it; "
    "ask for the weights as safetensors."
)


class _Sealed:
    """An object whose state a pickle cannot set: stand-ins are shared between files."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state for an object that has none")


@dataclass(frozen=True)
class StorageType(_Sealed):
    """Stand-in for a storage class, or for a dtype."""

    dtype: torch.dtype


@dataclass(frozen=True)
class StoredBytes(_Sealed):
    """A storage: a record of an archive, by its key."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class StoredTensor(_Sealed):
    """A tensor as the pickle describes it; `offset` and `stride` count elements."""

    storage: StoredBytes
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Marker(_Sealed):
    """An object that stands for itself: `VALUELESS` for a tensor on the meta device, `WRAPPER` for one of others."""


VALUELESS, WRAPPER = Marker(), Marker()


class PlainDict(dict[Any, Any]):
    """Stand-in for the kinds of dictionaries whose attributes a pickle can set: these are kept apart.

    Attributes:
        attributes: What the pickle sets.
    """

    __slots__ = ("attributes",)
    attributes: Any

    def __setstate__(self, state: Any) -> None:
        self.attributes = state


class ForeignObject:
    """Stand-in for an object of any other class: keeps the constructor's arguments, the state and the items.

    Attributes:
        qualified: Full name of the class.
        args: Arguments of the constructor.
        state: State that the pickle sets.
        items: List elements, or pairs of key and value.
    """

    qualified = ""
    args: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __new__(cls, *args: Any, **_: Any) -> ForeignObject:
        """Makes an object of any arguments."""
        made = super().__new__(cls)
        made.__dict__.update(args=args, state={}, items=[])
        return made

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__dict__["items"].append((key, value))

    def append(self, value: Any) -> None:
        """Keeps a list element."""
        self.__dict__["items"].append(value)

    def extend(self, values: Any) -> None:
        """Keeps list elements."""
        self.__dict__["items"].extend(values)


@dataclass
class Unpickled:
    """Content of a pickle.

    Attributes:
        value: Object of containers, numbers, strings, `StoredTensor` and `ForeignObject`.
        foreign: Names of all classes and functions that the pickle would import.
    """

    value: Any
    foreign: set[str] = field(default_factory=set)

    def code_findings(self, file: Path) -> list[Finding]:
        """Returns one finding if the pickle would call functions that can do anything, or make objects of classes."""
        called = sorted(filter(_is_dangerous, self.foreign))
        if called:
            names = ", ".join(called[:_MAX_NAMES])
            damage = DamagedFile(f"holds a pickle that would run code: {names}", kind="code", remedy=_CODE_REMEDY)
            return [damage.finding(file)]
        classes = self.classes()
        if not classes:
            return []
        names = ", ".join(classes[:_MAX_NAMES]) + (" ..." if len(classes) > _MAX_NAMES else "")
        message = f"{file.name}: torch.load takes it with weights_only=False only, for objects of {names}"
        return [Finding("classes", message, severity="info", file=str(file), remedy=_CLASSES_REMEDY)]

    def classes(self) -> list[str]:
        """Returns the names that torch.load refuses unless it may import them, and that are not mere data here."""
        return sorted(
            name
            for name in self.foreign
            if not name.startswith(_DATA_MODULES) and name not in _DATA_NAMES and name not in _admitted()
        )


@functools.cache
def _admitted() -> frozenset[str]:
    """Names that torch.load(weights_only=True) takes."""
    try:
        from torch._weights_only_unpickler import _get_allowed_globals
    except ImportError:  # another version of torch
        return frozenset()
    return frozenset(_get_allowed_globals())


def _is_dangerous(name: str) -> bool:
    """Whether a name of the standard library, or of a function of the interpreter, stands for more than data."""
    if name in _DATA_NAMES or name.startswith(_DATA_MODULES) or name in _admitted():
        return False
    return name.partition(".")[0] in sys.stdlib_module_names or name in _DANGEROUS_NAMES


def unpickle(data: bytes) -> Unpickled:
    """Reads a pickle without running its code. Memory and time are bounded by its length.

    Raises:
        DamagedFile: If the pickle is incomplete, or built to exhaust memory.
    """
    reader = _Unpickler(io.BytesIO(data))
    try:
        _screen(data)
        value = reader.load()
    except DamagedFile:
        raise
    except Exception as error:  # noqa: BLE001 - hostile opcodes raise anything at all in the standard library
        raise DamagedFile(f"holds a damaged pickle ({type(error).__name__})") from None
    return Unpickled(value, reader.foreign)


def plain(value: Any) -> Any:
    """Returns a copy as dicts, lists, numbers and strings, for metadata.

    Tensors become None, as does everything nested more than 20 deep or after the first million values.
    """
    return _PlainCopy().of(value, _MAX_METADATA_DEPTH)


class _PlainCopy:
    """Copies containers that may refer to each other many times over, up to a number of values."""

    def __init__(self) -> None:
        self._remaining = _MAX_METADATA_VALUES

    def of(self, value: Any, depth: int) -> Any:
        """Returns the copy of one value, nested at most `depth` deep."""
        self._remaining -= 1
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if depth == 0 or self._remaining < 0:
            return None
        if isinstance(value, ForeignObject):
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
        self._classes: dict[str, type[ForeignObject]] = {}
        self._storages: dict[str, StoredBytes] = {}
        self._getattr = _Call(self._member)

    def find_class(self, module: str, name: str) -> Any:
        """Returns the stand-in for a name, or an empty class with that name."""
        qualified = f"{_RENAMED.get(module, module)}.{name}"
        known = self._getattr if qualified == "builtins.getattr" else _KNOWN.get(qualified)
        if known is not None:
            return known
        self.foreign.add(qualified)
        if qualified not in self._classes:
            self._classes[qualified] = type("Foreign", (ForeignObject,), {"qualified": qualified})
        return self._classes[qualified]

    def _member(self, cls: Any, name: Any, *_: Any) -> ForeignObject:
        """Stand-in for getattr, with which Python 3.11.0 to 3.11.3 pickle enum members; other uses could run code."""
        qualified = getattr(cls, "qualified", "")
        if qualified not in _ENUMERATIONS:
            self.foreign.add("builtins.getattr")
        return ForeignObject(name)

    def persistent_load(self, reference: Any) -> Any:
        """Returns the storage behind a persistent id; old files keep classes behind others, with their source."""
        if isinstance(reference, tuple) and len(reference) == 4 and reference[0] == "module":
            return reference[1]
        _, storage, key, _, numel = reference[:5]
        if not (isinstance(storage, StorageType) and isinstance(key, str) and isinstance(numel, int)):
            raise pickle.UnpicklingError("not a reference to a storage")
        made = StoredBytes(key, storage.dtype, numel)
        if self._storages.setdefault(key, made) != made:  # a loader takes the first
            raise pickle.UnpicklingError("a storage with two types or sizes")
        return made


@dataclass(eq=False)
class _Node:
    """Stand-in for an object in `_screen`: its nesting depth and its size, with every repetition counted."""

    depth: int
    weight: int


_MARK = _Node(0, 0)


def _screen(data: bytes) -> None:
    """Runs the pickle on nodes in place of objects, and refuses it if it asks for too much.

    Every opcode's work is the size of its arguments: bytes of text, and objects. The sum bounds memory, and the time
    for hashing keys, which may be tuples of tuples.
    """
    stack: list[_Node] = []
    memo: dict[int, _Node] = {}
    remaining = _MAX_WORK_PER_BYTE * len(data) + _MAX_WORK
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
            remaining -= _apply(opcode, len(value) if isinstance(value, (str, bytes, bytearray)) else 0, stack)
        if remaining < 0 or count > _MAX_OPCODES:
            raise DamagedFile("holds a pickle that unfolds to far more objects than weights need")


def _apply(opcode: pickletools.OpcodeInfo, length: int, stack: list[_Node]) -> int:
    """Replaces an opcode's arguments on the stack by its result; returns the work."""
    taken: list[_Node] = []
    before = opcode.stack_before
    if pickletools.markobject in before:
        while (item := stack.pop()) is not _MARK:
            taken.append(item)
        before = before[: before.index(pickletools.markobject)]
    taken.extend(stack.pop() for _ in before)
    if _MARK in taken:
        raise ValueError("a mark where an object should be")
    container = taken.pop() if opcode.name in _MUTATING else _Node(0, length)
    work = 1 + sum(node.weight for node in taken)
    container.weight += work
    container.depth = max([container.depth, *(1 + node.depth for node in taken)])
    if container.depth > _MAX_NESTING:
        raise DamagedFile("holds a pickle that is nested far deeper than weights need")
    stack.extend(container for _ in opcode.stack_after)
    return work + length


@dataclass(frozen=True)
class _Call(_Sealed):
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
    if len(shape) > _MAX_DIMENSIONS or not isinstance(storage, StoredBytes):
        raise pickle.UnpicklingError("not a tensor")
    return StoredTensor(storage, dtype, offset, shape, stride)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _rebuild_from_type(function: Any, _kind: Any, args: Any, state: Any = None) -> Any:
    """A tensor of a class of its own; one that only wraps others (DTensor, quantized ones) becomes a dict of these."""
    made = function(*args)
    if made is not WRAPPER:
        return made
    parts = PlainDict()
    for part in state if isinstance(state, tuple) else (state,):  # attributes, and those in slots
        parts.update(part if isinstance(part, dict) else {})
    return parts


def _rebuild_wrapper(*_: Any) -> Any:
    return WRAPPER


def _rebuild_sparse(_layout: Any, parts: Any) -> Any:
    """Indices and values; a compressed layout has two tensors of indices."""
    return PlainDict((f"part{number}", part) for number, part in enumerate(parts) if isinstance(part, StoredTensor))


def _rebuild_quantized(storage: Any, offset: Any, shape: Any, stride: Any, parameters: Any, *_: Any) -> Any:
    made = PlainDict(int_repr=_tensor(storage, storage.dtype, offset, shape, stride))
    made.update((f"parameter{number}", part) for number, part in enumerate(parameters))
    return made


def _rebuild_nested(buffer: Any, *_: Any) -> Any:
    return buffer


def _rebuild_jagged(arguments: Any) -> Any:
    return arguments


def _rebuild_meta(*_: Any) -> Any:
    return VALUELESS


def _reconstruct(cls: Any, *_: Any) -> Any:
    return cls() if isinstance(cls, type) and issubclass(cls, ForeignObject) else None


def _encode(text: Any, *_: Any) -> Any:
    """Stand-in for how protocol 2 writes bytes. Keeps the text: a copy per call would fill the memory."""
    return text


_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # names of protocol 2
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
    "QInt8": torch.int8,
    "QUInt8": torch.uint8,
    "QInt32": torch.int32,
    "QUInt4x2": torch.uint8,
    "QUInt2x4": torch.uint8,
}
_KNOWN: dict[str, Any] = {
    "collections.OrderedDict": PlainDict,
    "collections.defaultdict": _Call(lambda *args: PlainDict(*args[1:])),
    "collections.Counter": PlainDict,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.dict": PlainDict,
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
    "torch._utils._rebuild_wrapper_subclass": _Call(_rebuild_wrapper),
    "torch._utils._rebuild_sparse_tensor": _Call(_rebuild_sparse),
    "torch._utils._rebuild_sparse_csr_tensor": _Call(_rebuild_sparse),
    "torch._utils._rebuild_qtensor": _Call(_rebuild_quantized),
    "torch._utils._rebuild_nested_tensor": _Call(_rebuild_nested),
    "torch.nested._internal.nested_tensor._rebuild_njt": _Call(_rebuild_jagged),
    "torch._utils._rebuild_meta_tensor_no_storage": _Call(_rebuild_meta),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _Call(_rebuild_parameter),
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
        "builtins.bytes",
        "collections.ChainMap",
        "collections.UserDict",
        "collections.UserList",
        "collections.deque",
        "datetime.date",
        "datetime.datetime",
        "datetime.time",
        "datetime.timedelta",
        "datetime.timezone",
        "decimal.Decimal",
        "fractions.Fraction",
        "functools.partial",
        "numpy.dtype",
        "numpy.ndarray",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib.PurePath",
        "pathlib.PurePosixPath",
        "pathlib.PureWindowsPath",
        "pathlib.WindowsPath",
        "pathlib._local.PosixPath",
        "pathlib._local.WindowsPath",
        "torch.Tensor",
        "torch.device",
        "torch.nn.parameter.Parameter",
        "torch.serialization._get_layout",
        "_io.BytesIO",
        "array._array_reconstructor",
        "logging.Logger",
        "logging.getLogger",
        "random.Random",
        "re._compile",
        "types.SimpleNamespace",
        "uuid.UUID",
    }
)
_DANGEROUS_NAMES = frozenset(
    {
        "nt.system",
        "numpy.testing._private.utils.runstring",
        "pip.main",
        "torch.hub.load",
        "torch.hub.load_state_dict_from_url",
        "torch.load",
        "torch.serialization.load",
        "torch.utils.cpp_extension.load",
        "torch.utils.cpp_extension.load_inline",
    }
)
_DATA_MODULES = (  # classes that hold settings or state
    "accelerate.utils.dataclasses.",
    "deepspeed.runtime.fp16.loss_scaler.",
    "deepspeed.runtime.zero.config.",
    "deepspeed.utils.tensor_fragment.",
    "torch._C._nn.",
    "typing.",
    "torch.distributed._mesh_layout.",
    "torch.distributed._tensor.",
    "torch.distributed.checkpoint.metadata.",
    "torch.distributed.device_mesh.",
    "torch.distributed.tensor.",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "transformers.trainer_pt_utils.",
    "transformers.trainer_utils.",
    "transformers.training_args.",
)
