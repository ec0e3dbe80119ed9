"""The frames of a trace, and its file. Standard library only: traces are read without torch."""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hallo_numguard.core.atomic_files import write_whole
from hallo_numguard.core.documents import decode, encode
from hallo_numguard.core.records import Offender, Record, counts_in_words, shape_in_words

SCHEMA_VERSION = 1

PARTS = {
    "inputs": "input",
    "weights": "weight",
    "outputs": "output",
    "grad_outputs": "gradient of output",
    "grad_inputs": "gradient of input",
    "grad_weights": "gradient of weight",
}
"""The parts of a frame, and the name of a tensor in each of them."""

_BACKWARD = "grad_"
_GZIP = b"\x1f\x8b"
_HEADER_LINE = re.compile(rb'\s*\{[^\n]*"kind":\s*"trace"')
_HEADER_BYTES = 4096  # beginning of a file, which identifies a trace


@dataclass(frozen=True)
class TensorRecord:
    """A tensor, or its gradient, at the moment of a module's call.

    Attributes:
        name: "input[0]", "output['hidden']", or a weight's own name inside of the module, as "weight".
        shape: Shape of the tensor.
        dtype: Dtype of the tensor, as "float16".
        record: Statistics of its elements.
        index: Index of the first non-finite element, in the tensor's shape; () if all are finite.
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

    def offender(self, kind: str, name: str, module: str, rank: int | None) -> Offender:
        """Returns this tensor as an offender; see its attributes."""
        return Offender(
            kind=kind,
            name=name,
            module=module,
            rank=rank,
            index=self.index,
            nan=self.record.nan,
            pos_inf=self.record.pos_inf,
            neg_inf=self.record.neg_inf,
            absmax=self.record.absmax,
            numel=math.prod(self.shape),
            shape=self.shape,
            dtype=self.dtype,
        )


@dataclass(frozen=True)
class Frame:
    """One call of one module.

    Attributes:
        position: Position in the order of completion, from 0; a module comes after the modules in it.
        name: Fully qualified name of the module, "" for the root.
        cls: Class of the module.
        call: Number of earlier calls of the module.
        parent: Position of the enclosing call; None for the outermost.
        inputs: Tensor arguments of the module.
        weights: The module's own parameters and buffers, not those of modules inside of it.
        outputs: Tensors that the module returned.
        grad_outputs: Gradients with respect to the outputs, where a backward pass gave them.
        grad_inputs: Gradients with respect to the inputs, where a backward pass gave them.
        grad_weights: Gradients with respect to the weights, where a backward pass gave them.
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
        """Yields all tensors, each with its part of the frame, a key of `PARTS`."""
        for part in PARTS:
            for tensor in getattr(self, part):
                yield part, tensor


@dataclass(frozen=True)
class Origin:
    """The first call that turned finite into non-finite.

    Attributes:
        name: Fully qualified name of the module, or of the weight or input that was already non-finite.
        module: Class of the module.
        phase: "forward" or "backward".
        call: Number of earlier calls of the module.
        index: Index of the first non-finite element, in the shape of the tensor.
        kind: "activation", "gradient"; "parameter", "buffer" or "input" if that was already non-finite.
        tensor: The output, input, weight or gradient that was not finite.
        position: Position of the frame.
        neighbours: Values around that element in the flattened tensor, if they were kept.
        operation: Operation inside of the module, and the line that called it, if a second pass found them.
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


class NonfiniteTensor(NamedTuple):
    """A tensor that is not finite.

    Attributes:
        frame: Call of a module with this tensor.
        part: Part of that frame, a key of `PARTS`.
        tensor: Record of the tensor.
    """

    frame: Frame
    part: str
    tensor: TensorRecord


@dataclass(frozen=True)
class Frames:
    """A whole trace.

    Attributes:
        frames: Calls, in the order of completion.
        first_nonfinite: The first call that turned finite into non-finite; None if everything stayed finite.
        dropped: Number of frames at the beginning that were not kept.
    """

    frames: Sequence[Frame]
    first_nonfinite: Origin | None
    dropped: int = 0

    def nonfinite_tensors(self) -> Iterator[NonfiniteTensor]:
        """Yields tensors of the forward pass in the order of calls, then gradients in the reverse order."""
        for frame in self.frames:
            yield from _nonfinite(frame, backward=False)
        for frame in reversed(self.frames):
            yield from _nonfinite(frame, backward=True)


def _nonfinite(frame: Frame, backward: bool) -> Iterator[NonfiniteTensor]:
    for part, tensor in frame.tensors():
        if tensor.counts and part.startswith(_BACKWARD) == backward:
            yield NonfiniteTensor(frame, part, tensor)


@dataclass(frozen=True)
class Header:
    """First line of a trace's file.

    Attributes:
        schema_version: Version of the format.
        kind: "trace".
        dropped: Number of frames at the beginning that were not kept.
        first_nonfinite: The first call that turned finite into non-finite; None if everything stayed finite.
    """

    schema_version: int
    kind: str
    dropped: int
    first_nonfinite: Origin | None


def save(trace: Frames, path: str | Path) -> None:
    """Writes a trace as JSON lines, compressed if the name ends in .gz: a header, then one line per frame.

    Non-finite numbers are written as strings. The file is written whole or not at all.
    """
    path = Path(path)
    header = Header(SCHEMA_VERSION, "trace", trace.dropped, trace.first_nonfinite)
    lines = [json.dumps(encode(document), allow_nan=False) for document in (header, *trace.frames)]
    data = ("\n".join(lines) + "\n").encode()
    write_whole(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def load_trace(path: str | Path) -> Frames:
    """Reads the file that `save` wrote.

    Raises:
        ValueError: If the file is no trace, or of an unknown schema version; names the file.
        OSError: If it cannot be read.
    """
    try:
        return read(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not a trace of hallo-numguard: {error}") from error


def read(data: bytes) -> Frames:
    """Returns the trace in the bytes of a file.

    Raises:
        ValueError: If they hold no trace, or one of an unknown schema version; `InvalidDocument` if a value has the
            wrong type.
    """
    try:
        text = (gzip.decompress(data) if data.startswith(_GZIP) else data).decode()
    except (EOFError, OSError) as error:
        raise ValueError(f"cannot be decompressed: {error}") from error
    header, *frames = map(json.loads, text.splitlines() or [""])
    if not isinstance(header, Mapping) or header.get("kind") != "trace":
        raise ValueError("the first line is no header of a trace")
    if header.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"schema version {header.get('schema_version')!r}, expected {SCHEMA_VERSION}")
    first = decode(Header, header)
    return Frames(tuple(decode(Frame, frame) for frame in frames), first.first_nonfinite, first.dropped)


def is_trace(data: bytes) -> bool:
    """Returns whether the beginning of a file is that of a trace."""
    return data.startswith(_GZIP) or _HEADER_LINE.match(data[:_HEADER_BYTES]) is not None
