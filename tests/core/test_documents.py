"""Documents: what dataclasses become in JSON, what comes back, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import pytest

from hallo_numguard.core.documents import InvalidDocument, decode, encode, laid_out_as


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Squares:
    """A number, kept as its square."""

    square: float

    @classmethod
    def of(cls, root):
        return cls(root * root)

    def value(self):
        return math.sqrt(self.square)


@dataclass(frozen=True)
class Point:
    x: float
    label: str = ""


@dataclass(frozen=True)
class Everything:
    number: float
    count: int
    is_on: bool
    text: str
    colour: Colour
    point: Point | None
    path: tuple[Point, ...]
    sizes: Mapping[str, int]
    fact: str | int | None
    root: float = laid_out_as(Squares, default=3.0)
    extra: tuple[int, ...] = field(default=())


WHOLE = Everything(1.5, 2, True, "a", Colour.BLUE, Point(-math.inf), (Point(0.0), Point(1.0, "b")), {"k": 7}, "x", 4.0)


def written(value):
    return json.loads(json.dumps(encode(value), allow_nan=False))


def test_what_is_written_is_read_back():
    assert decode(Everything, written(WHOLE)) == WHOLE
    assert written(WHOLE)["root"] == {"square": 16.0}
    assert written(WHOLE)["point"] == {"x": "-Infinity", "label": ""}


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, -0.0, 5e-324, 1.7976931348623157e308])
def test_every_float_survives(number):
    assert repr(decode(float, written(number))) == repr(number)


def test_fields_with_a_default_may_be_missing_and_unknown_ones_are_ignored():
    document = written(WHOLE)
    del document["root"], document["extra"]
    assert decode(Everything, {**document, "of a later version": 1}).root == 3.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"number": "1.5"}, "number: expected a number, got '1.5'"),
        ({"number": True}, "number: expected a number"),
        ({"number": 10**400}, "number: expected a number that a float64 holds"),
        ({"count": 2.0}, "count: expected an integer, got 2.0"),
        ({"count": True}, "count: expected an integer"),
        ({"is_on": 1}, "is_on: expected true or false, got 1"),
        ({"text": None}, "text: expected a string, got None"),
        ({"colour": "green"}, "colour: expected one of red, blue, got 'green'"),
        ({"colour": []}, "colour: expected one of red, blue"),
        ({"point": 3}, "point: expected an object, got 3"),
        ({"path": {}}, "path: expected an array"),
        ({"path": [{"x": 1}, {"label": ""}]}, "path.1: expected an object with x"),
        ({"sizes": {"k": 1, "odd": "7"}}, "sizes.odd: expected an integer, got '7'"),
        ({"fact": 1.5}, "fact: expected a string"),
        ({"root": 4.0}, "root: expected an object"),
    ],
    ids=str,
)
def test_other_types_are_refused_with_the_place(change, message):
    with pytest.raises(InvalidDocument, match=f"^{message}"):
        decode(Everything, {**written(WHOLE), **change})


def test_a_large_wrong_value_makes_no_large_message():
    with pytest.raises(InvalidDocument) as caught:
        decode(Everything, [list(range(1000))] * 1000)
    assert len(str(caught.value)) < 200


def test_an_annotation_that_documents_cannot_hold_is_a_programming_error():
    with pytest.raises(TypeError, match="documents cannot hold"):
        decode(set[int], [])
