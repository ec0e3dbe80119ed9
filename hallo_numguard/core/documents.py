"""Dataclasses as JSON documents, and back. Non-finite numbers are strings, because JSON has no such numbers."""

from __future__ import annotations

import contextlib
import functools
import math
import reprlib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, field, fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
Decoder = Callable[[Any], Any]

DOCUMENT = "document"
"""Metadata key of a dataclass field that has another layout in documents; see `laid_out_as`."""

_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class InvalidDocument(ValueError):
    """A value of a document differs from the dataclass's declaration; the text has place, expectation and value."""

    def __init__(self, expected: str, found: Any) -> None:
        super().__init__(f"expected {expected}, got {reprlib.repr(found)}")
        self.path: list[str] = []  # innermost first

    def __str__(self) -> str:
        return ": ".join(filter(None, (".".join(reversed(self.path)), *self.args)))


def laid_out_as(layout: type, **options: Any) -> Any:
    """Returns a dataclass field with another layout in documents.

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
    """Returns the value that `encode` made a document of. Unknown fields are ignored.

    Args:
        declared: The dataclass, or another annotation.
        document: Value that `json.loads` returned.

    Raises:
        InvalidDocument: If its contents differ from the declaration.
    """
    hint: Any = declared
    decoded: T = _decoder(hint)(document)
    return decoded


@functools.cache
def _decoder(declared: Any) -> Decoder:
    """Returns a function that decodes documents of one annotation; made once, because reports hold many numbers."""
    origin, arguments = get_origin(declared) or declared, get_args(declared)
    if origin in (Union, types.UnionType):
        return _union_decoder(arguments)
    if origin in (tuple, Sequence):
        return functools.partial(_array, _decoder(arguments[0]))
    if origin is Mapping:
        item = _decoder(arguments[1])
        return lambda document: _items(((key, item) for key in _checked(document, dict, "an object")), document)
    if declared in _SCALARS:
        return _SCALARS[declared]
    if isinstance(declared, type) and issubclass(declared, Enum):
        return functools.partial(_member, declared)
    if isinstance(declared, type) and is_dataclass(declared):
        return _dataclass_decoder(declared)
    raise TypeError(f"documents cannot hold {declared}")


def _dataclass_decoder(declared: type) -> Decoder:
    hints = get_type_hints(declared)
    decoders = {
        item.name: _layout_decoder(item.metadata[DOCUMENT]) if DOCUMENT in item.metadata else _decoder(hints[item.name])
        for item in fields(declared)
    }
    required = {item.name for item in fields(declared) if item.default is item.default_factory is MISSING}

    def decode_object(document: Any) -> Any:
        missing = required - _checked(document, dict, "an object").keys()
        if missing:
            raise InvalidDocument(f"an object with {', '.join(sorted(missing))}", document)
        return declared(**_items((pair for pair in decoders.items() if pair[0] in document), document))

    return decode_object


def _layout_decoder(layout: Any) -> Decoder:
    inner = _decoder(layout)
    return lambda document: inner(document).value()


def _items(decoders: Iterable[tuple[str, Decoder]], document: Mapping[str, Any]) -> dict[str, Any]:
    items, name = {}, ""
    try:
        for name, decoder in decoders:
            items[name] = decoder(document[name])
    except InvalidDocument as error:
        error.path.append(name)
        raise
    return items


def _checked(document: Any, kind: Any, expected: str) -> Any:
    if not isinstance(document, kind) or (isinstance(document, bool) and kind is not bool):  # True is an int
        raise InvalidDocument(expected, document)
    return document


def _union_decoder(choices: Sequence[Any]) -> Decoder:
    first, *others = [_decoder(choice) for choice in choices if choice is not types.NoneType]
    has_none = types.NoneType in choices

    def decode_choice(document: Any) -> Any:
        if document is None and has_none:
            return None
        try:
            return first(document)
        except InvalidDocument:
            for decoder in others:
                with contextlib.suppress(InvalidDocument):
                    return decoder(document)
            raise

    return decode_choice


def _array(item: Decoder, document: Any) -> tuple[Any, ...]:
    values = _checked(document, (list, tuple), "an array")
    items: list[Any] = []
    try:
        items.extend(map(item, values))
    except InvalidDocument as error:
        error.path.append(str(len(items)))
        raise
    return tuple(items)


def _member(declared: type[Enum], document: Any) -> Enum:
    try:
        return declared(document)
    except ValueError as error:
        raise InvalidDocument(f"one of {', '.join(str(member.value) for member in declared)}", document) from error


def _number(document: Any) -> float:
    if type(document) is float:
        return document
    if isinstance(document, str) and document in _NONFINITE:
        return _NONFINITE[document]
    try:
        return float(_checked(document, (float, int), "a number"))
    except OverflowError as error:
        raise InvalidDocument("a number that a float64 holds", document) from error


_SCALARS: Mapping[Any, Decoder] = {
    float: _number,
    int: lambda document: _checked(document, int, "an integer"),
    bool: lambda document: _checked(document, bool, "true or false"),
    str: lambda document: _checked(document, str, "a string"),
}
