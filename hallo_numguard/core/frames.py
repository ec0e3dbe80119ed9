"""The frames of a trace, and the file that they are kept in. Standard library only: traces are read without torch."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hallo_numguard.core.atomic_files import write_whole
from hallo_numguard.core.documents import without_nonfinite
from hallo_numguard.core.records import Record, counts_in_words, shape_in_words

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class TensorRecord:
    """A tensor at the moment when a module got it or made it, or its gradient.

    Attributes:
        name: "input[0]", "output['hidden']", or of a weight its own name inside of the module, as "weight".
        shape, dtype: Of the tensor.
        record: What it held.
        index: Of the first non-finite element, in the tensor's shape; () if all are finite.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    record: Record
    index: tuple[int, ...] = ()

    @property
    def counts(self) -> str:
        """The non-finite values in words, for example "2 NaN, 1 +Inf"; "" if there are none."""
        return counts_in_words(self.record.nan, self.record.pos_inf, self.record.neg_inf)


@dataclass(frozen=True)
class Frame:
    """One call of one module.

    Attributes:
        position: Place in the order in which calls were completed, from 0; a module comes after those inside of it.
        name: Fully qualified name of the module, "" for the root.
        cls: Its class.
        call: How often this module had been called before.
        parent: Position of the call that this one was made in; None for the outermost.
        inputs, outputs: What it was called with, and what it returned.
        weights: Its own parameters and buffers, not those of modules inside of it.
        grad_outputs, grad_inputs, grad_weights: Gradients with respect to these, where a backward pass gave them.
    """

    position: int
    name: str
    cls: str
    call: int
    parent: int | None
    inputs: tuple[TensorRecord, ...] = ()
    weights: tuple[TensorRecord, ...] = ()
    outputs: tuple[TensorRecord, ...] = ()
    grad_outputs: tuple[TensorRecord, ...] = ()
    grad_inputs: tuple[TensorRecord, ...] = ()
    grad_weights: tuple[TensorRecord, ...] = ()

    def tensors(self) -> Iterator[tuple[str, TensorRecord]]:
        """Yields all of them, each with the part of the frame that it is of."""
        for part in _PARTS:
            for tensor in getattr(self, part):
                yield part, tensor


_PARTS = ("inputs", "weights", "outputs", "grad_outputs", "grad_inputs", "grad_weights")


@dataclass(frozen=True)
class Origin:
    """The first call that turned finite into non-finite.

    Attributes:
        name: Fully qualified name of the module; of a weight or an input that was not finite already, its own.
        module: Class of the module.
        phase: "forward" or "backward".
        call: How often the module had been called before.
        index: Of the first non-finite element, in the shape of the tensor.
        kind: "activation", "gradient"; "parameter", "buffer" or "input" if that was where it came from.
        tensor: What was not finite: an output, an input or a weight, or the gradient of one.
        position: Of the frame.
        neighbours: Values around that element in the flattened tensor, where they were kept.
        operation: The operation inside of the module, and the line that called it, where a second pass has named it.
    """

    name: str
    module: str
    phase: str
    call: int
    index: tuple[int, ...]
    kind: str
    tensor: TensorRecord
    position: int
    neighbours: tuple[float, ...] = ()
    operation: str = ""

    def __str__(self) -> str:
        where = f"{self.name or 'the root module'} ({self.module}, call {self.call}, {self.phase})"
        position = f"[{', '.join(map(str, self.index))}]" if self.index else ""
        operation = f", in {self.operation}" if self.operation else ""
        shape = shape_in_words(self.tensor.shape)
        return (
            f"{where}: {self.tensor.name}{position} holds {self.tensor.counts} ({shape} {self.tensor.dtype}){operation}"
        )


@dataclass(frozen=True)
class Frames:
    """A whole trace.

    Attributes:
        frames: In the order in which calls were completed.
        first_nonfinite: See `Origin`; None if everything stayed finite.
        dropped: Number of frames at the beginning that were not kept.
    """

    frames: Sequence[Frame]
    first_nonfinite: Origin | None
    dropped: int = 0


def save(trace: Frames, path: str | Path) -> None:
    """Writes a trace as JSON lines, compressed if the name ends in .gz: a header, then a line a frame.

    Non-finite numbers are written as strings. The file is written whole or not at all.
    """
    path = Path(path)
    first = trace.first_nonfinite
    header = {
        "schema_version": SCHEMA_VERSION,
        "kind": "trace",
        "dropped": trace.dropped,
        "first_nonfinite": first and asdict(first),
    }
    lines = [
        json.dumps(without_nonfinite(document), allow_nan=False) for document in (header, *map(asdict, trace.frames))
    ]
    data = ("\n".join(lines) + "\n").encode()
    write_whole(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def load(path: str | Path) -> Frames:
    """Reads what `save` wrote.

    Raises:
        ValueError: If it is no trace, or of a version that this one cannot read; names the file.
        OSError: If it cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
        header, *frames = map(json.loads, text.splitlines())
        if header.get("kind") != "trace" or header["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {header.get('schema_version')!r}, expected {SCHEMA_VERSION}")
        first = header["first_nonfinite"]
        return Frames(tuple(map(_frame, frames)), first and _origin(first), int(header["dropped"]))
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a trace of hallo-numguard: {error}") from error


def _frame(document: Mapping[str, Any]) -> Frame:
    return Frame(**{**document, **{part: tuple(map(_tensor, document[part])) for part in _PARTS}})


def _tensor(document: Mapping[str, Any]) -> TensorRecord:
    figures = {name: float(document["record"][name]) for name in ("absmax", "sumsq")}
    record = Record(**{**document["record"], **figures})
    return TensorRecord(document["name"], tuple(document["shape"]), document["dtype"], record, tuple(document["index"]))


def _origin(document: Mapping[str, Any]) -> Origin:
    return Origin(
        **{
            **document,
            "index": tuple(document["index"]),
            "tensor": _tensor(document["tensor"]),
            "neighbours": tuple(map(float, document["neighbours"])),
        }
    )
