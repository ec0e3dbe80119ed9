"""Where a non-finite value came from, operation by operation. Standard library only: reports are read without torch."""

from __future__ import annotations

from dataclasses import dataclass

from hallo_numguard.core.frames import TensorRecord

WRITTEN_DOWN = "the code itself writes this number"
"""Explanation of an operation that was given nothing but a number of the code."""
COMMUNICATION = ("c10d", "_c10d_functional", "c10d_functional")
"""Where torch has its collectives, among operations."""


@dataclass(frozen=True)
class Source:
    """The first place in a step at which a non-finite value stood, found by following it through every operation.

    Attributes:
        kind: "operation"; "parameter", "buffer", "input" or "gradient" (of the model's output) if it was there before;
            "outside" for another tensor that was there before.
        name: Name of that tensor; "" for an operation.
        operation: Operation of torch, as "aten.div.Tensor"; "" without one.
        phase: "forward" or "backward".
        node: Class of the autograd node whose backward pass it was, as "SqrtBackward0"; "" in the forward pass.
        line: Line of code that called the operation, or whose backward pass it was, as "train.py:12 in loss: x / y".
        module: Innermost module of the model that was being called, "" for the root; None outside of the model's call.
        cls: Class of that module.
        call: Number of earlier calls of that module.
        tensor: The tensor, at that moment.
        sample: Position in the batch of its first non-finite element; None if unknown.
        explanation: Sentence on what the operation was given there; "" if nothing is known.
        is_singular: Whether the operation has no finite value there, whatever its arguments are scaled by.
        fill: What has written the Inf, on purpose as into a mask, of which the operation made NaN; "" if nothing has.
        large: Sentence on the largest numbers that it was given; "" if they were not large.
        hidden_by: Operations with their lines that made finite values of what followed from it, in order.
        rank: Global rank on which it was found; None where it was not asked for.
        is_fill: Whether the operation wrote -Inf or Inf on purpose, as into a mask.
        collectives: Number of collectives that the rank had met before it: what several ranks have found is compared by
            it, as one that came later may have been received from another rank.
    """

    kind: str
    name: str
    operation: str
    phase: str
    node: str
    line: str | None
    module: str | None
    cls: str
    call: int
    tensor: TensorRecord
    sample: int | None = None
    explanation: str = ""
    is_singular: bool = False
    fill: str = ""
    large: str = ""
    hidden_by: tuple[str, ...] = ()
    rank: int | None = None
    is_fill: bool = False
    collectives: int = 0

    @property
    def is_received(self) -> bool:
        """Whether it came out of a collective, to which this rank had given finite values."""
        return self.operation.partition(".")[0] in COMMUNICATION
