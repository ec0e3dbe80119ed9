"""Dataclasses as JSON documents, and back. Non-finite numbers are strings, which every JSON reader can read."""

from __future__ import annotations

import functools
import math
import reprlib
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, field, fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
Decoder = Callable[[Any], Any]

DOCUMENT = "document"
"""Metadata key of a dataclass field that has another layout in documents; see `laid_out_as`."""

_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class InvalidDocument(ValueError):
    """A value of a document is not what the dataclass declares; the text says where, what was expected and found."""

    def __init__(self, expected: str, found: Any) -> None:
        super().__init__(f"expected {expected}, got {reprlib.repr(found)}")
        self.path: list[str] = []  # innermost first

    def __str__(self) -> str:
        return ": ".join(filter(None, (".".join(reversed(self.path)), *self.args)))


def laid_out_as(layout: type, **options: Any) -> Any:
    """Returns a dataclass field that documents hold in another layout.

    Args:
        layout: Dataclass of the document, with `of(value)` and `value()` to convert.
        **options: Options of `dataclasses.field`.
    """
    return field(**options, metadata={DOCUMENT: layout})


def encode(value: Any) -> Any:
    """Returns a value that JSON has: dataclasses as objects, tuples as lists, NaN and infinite numbers as strings."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: _encode_field(item.metadata, getattr(value, item.name)) for item in fields(value)}
    return value


def _encode_field(metadata: Mapping[str, Any], value: Any) -> Any:
    return encode(metadata[DOCUMENT].of(value) if DOCUMENT in metadata else value)


def decode(declared: type[T], document: Any) -> T:
    """Returns what `encode` made a document of. Fields that the dataclass does not have are ignored.

    Args:
        declared: The dataclass, or another annotation.
        document: Value that `json.loads` returned.

    Raises:
        InvalidDocument: If it holds anything else than is declared.
    """
    hint: Any = declared
    decoded: T = _decoder(hint)(document)
    return decoded


@functools.cache
def _decoder(declared: Any) -> Decoder:
    origin, arguments = get_origin(declared) or declared, get_args(declared)
    if origin in (Union, types.UnionType):
        return _union(arguments)
    if origin in (tuple, Sequence):
        return _sequence(_decoder(arguments[0]))
    if origin is Mapping:
        return _mapping(_decoder(arguments[1]))
    if declared is float:
        return _number
    if declared in _SCALARS:
        return _scalar(declared)
    if isinstance(declared, type) and issubclass(declared, Enum):
        return _enum(declared)
    if isinstance(declared, type) and is_dataclass(declared):
        return _dataclass(declared)
    raise TypeError(f"documents cannot hold {declared}")


def _dataclass(declared: type) -> Decoder:
    hints = get_type_hints(declared)
    decoders: dict[str, Decoder] = {}
    required = set()
    for item in fields(declared):
        layout = item.metadata.get(DOCUMENT)
        decoders[item.name] = _decoder(hints[item.name]) if layout is None else _layout(layout)
        if item.default is MISSING and item.default_factory is MISSING:
            required.add(item.name)

    def decode_object(document: Any) -> Any:
        if not isinstance(document, Mapping):
            raise InvalidDocument("an object", document)
        if missing := required - document.keys():
            raise InvalidDocument(f"an object with {', '.join(sorted(missing))}", document)
        known = {name: document[name] for name in decoders if name in document}
        return declared(**{name: _at(name, decoders[name], value) for name, value in known.items()})

    return decode_object


def _layout(layout: Any) -> Decoder:
    inner = _decoder(layout)
    return lambda document: inner(document).value()


def _sequence(inner: Decoder) -> Decoder:
    def decode_array(document: Any) -> Any:
        if not isinstance(document, (list, tuple)):
            raise InvalidDocument("an array", document)
        return tuple([_at(str(position), inner, item) for position, item in enumerate(document)])

    return decode_array


def _mapping(inner: Decoder) -> Decoder:
    def decode_object(document: Any) -> Any:
        if not isinstance(document, Mapping):
            raise InvalidDocument("an object", document)
        return {key: _at(key, inner, item) for key, item in document.items()}

    return decode_object


def _union(choices: Sequence[Any]) -> Decoder:
    inner = [_decoder(choice) for choice in choices if choice is not types.NoneType]
    has_none = types.NoneType in choices

    def decode_choice(document: Any) -> Any:
        if document is None and has_none:
            return None
        for decoder in inner[:-1]:
            try:
                return decoder(document)
            except InvalidDocument:
                continue
        return inner[-1](document)

    return decode_choice


def _enum(declared: type[Enum]) -> Decoder:
    def decode_member(document: Any) -> Any:
        try:
            return declared(document)
        except ValueError as error:
            known = ", ".join(str(member.value) for member in declared)
            raise InvalidDocument(f"one of {known}", document) from error

    return decode_member


def _at(name: str, inner: Decoder, document: Any) -> Any:
    try:
        return inner(document)
    except InvalidDocument as error:
        error.path.append(name)
        raise


def _number(document: Any) -> float:
    if isinstance(document, str) and document in _NONFINITE:
        return _NONFINITE[document]
    if isinstance(document, (float, int)) and not isinstance(document, bool):
        try:
            return float(document)
        except OverflowError as error:
            raise InvalidDocument("a number that a float64 holds", document) from error
    raise InvalidDocument("a number", document)


def _scalar(declared: type) -> Decoder:
    def decode_scalar(document: Any) -> Any:
        if type(document) is not declared:  # True is an int, but no integer
            raise InvalidDocument(_SCALARS[declared], document)
        return document

    return decode_scalar


_SCALARS = {int: "an integer", bool: "true or false", str: "a string"}
