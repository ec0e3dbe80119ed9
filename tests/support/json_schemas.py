"""JSON Schemas of documents, made from the dataclasses; with UPDATE_GOLDENS=1 a test writes them into docs/."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import jsonschema

from hallo_numguard.core.documents import DOCUMENT
from hallo_numguard.core.frames import SCHEMA_VERSION as TRACE_VERSION
from hallo_numguard.core.frames import Frame, Header
from hallo_numguard.core.overflow_report import SCHEMA_VERSION, OverflowReport

from paths import ROOT

NUMBER = {"anyOf": [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}]}
SCALARS = {
    int: {"type": "integer"},
    bool: {"type": "boolean"},
    str: {"type": "string"},
    types.NoneType: {"type": "null"},
}
ATTRIBUTE = re.compile(r"^        (\w+): (.*(?:\n            .*)*)", re.MULTILINE)


def path_of(name: str) -> Path:
    """Returns the published schema of "report" or "trace"."""
    return ROOT / "docs" / f"{name}.schema.json"


def validator(name: str) -> jsonschema.Draft202012Validator:
    schema = json.loads(path_of(name).read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def report_schema() -> str:
    definitions: dict[str, Any] = {"number": NUMBER}
    of(OverflowReport, definitions)
    report = definitions.pop("OverflowReport")
    report["properties"] = {"schema_version": {"const": SCHEMA_VERSION}, **report["properties"]}
    report["required"].insert(0, "schema_version")
    return text({"title": "An overflow report of hallo-numguard", **report, "$defs": definitions})


def trace_schema() -> str:
    definitions: dict[str, Any] = {"number": NUMBER}
    lines = [of(Header, definitions), of(Frame, definitions)]
    definitions["Header"]["properties"] |= {"schema_version": {"const": TRACE_VERSION}, "kind": {"const": "trace"}}
    return text({"title": "A line of a trace of hallo-numguard", "oneOf": lines, "$defs": definitions})


def of(declared: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema of one annotation; dataclasses go into `definitions`."""
    origin, arguments = get_origin(declared) or declared, get_args(declared)
    if origin in (Union, types.UnionType):
        return {"anyOf": [of(choice, definitions) for choice in arguments]}
    if origin in (tuple, Sequence):
        return {"type": "array", "items": of(arguments[0], definitions)}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": of(arguments[1], definitions)}
    if is_dataclass(declared):
        name = declared.__name__.lstrip("_")
        if name not in definitions:
            definitions[name] = {}  # holds the place, in the order of reading
            definitions[name].update(of_dataclass(declared, definitions))
        return {"$ref": f"#/$defs/{name}"}
    if issubclass(declared, Enum):
        return {"enum": [member.value for member in declared]}
    return {"$ref": "#/$defs/number"} if declared is float else SCALARS[declared]


def of_dataclass(declared: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    hints, documentation = get_type_hints(declared), declared.__doc__
    meaning = {name: " ".join(sentences.split()) for name, sentences in ATTRIBUTE.findall(documentation)}
    properties, required = {}, []
    for item in fields(declared):
        described = {"description": meaning[item.name]} if item.name in meaning else {}
        properties[item.name] = {**described, **of(item.metadata.get(DOCUMENT, hints[item.name]), definitions)}
        if item.default is item.default_factory is MISSING:
            required.append(item.name)
    return {
        "description": documentation.partition("\n")[0],
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def text(schema: Mapping[str, Any]) -> str:
    return "\n".join(lines({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, levels=4)) + "\n"


def lines(value: Any, levels: int, indent: str = "") -> Iterator[str]:
    """Yields JSON that is laid out to be read: properties have a line each."""
    if levels == 0 or not isinstance(value, dict) or len(json.dumps(value)) < 100:
        yield f"{indent}{json.dumps(value)}"
        return
    yield f"{indent}{{"
    for position, (key, item) in enumerate(value.items(), start=1):
        first, *rest = lines(item, levels - 1, indent + "  ")
        inner = [f"{indent}  {json.dumps(key)}: {first.strip()}", *rest]
        inner[-1] += "," if position < len(value) else ""
        yield from inner
    yield f"{indent}}}"
