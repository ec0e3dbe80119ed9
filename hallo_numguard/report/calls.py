"""The tensors of a trace that are not finite, in the order in which they became so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from hallo_numguard.core.frames import Frame, Frames, TensorRecord

PARTS = {
    "inputs": "input",
    "weights": "weight",
    "outputs": "output",
    "grad_outputs": "gradient of output",
    "grad_inputs": "gradient of input",
    "grad_weights": "gradient of weight",
}
"""The parts of a frame, and what a tensor in each of them is called."""

_BACKWARD = "grad_"


class NonfiniteTensor(NamedTuple):
    """Where it stands, and what it holds. `part` is a key of `PARTS`."""

    frame: Frame
    part: str
    tensor: TensorRecord


def nonfinite_tensors(trace: Frames) -> Iterator[NonfiniteTensor]:
    """Yields those of the forward pass in the order of calls, then gradients in the reverse order."""
    for frame in trace.frames:
        yield from _of(frame, backward=False)
    for frame in reversed(trace.frames):
        yield from _of(frame, backward=True)


def _of(frame: Frame, backward: bool) -> Iterator[NonfiniteTensor]:
    for part, tensor in frame.tensors():
        if tensor.counts and part.startswith(_BACKWARD) == backward:
            yield NonfiniteTensor(frame, part, tensor)
