"""Records and reports' value types. Standard library only: reports are read where torch is not installed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

RECORD_FIELDS = (
    "nan",
    "pos_inf",
    "neg_inf",
    "zeros",
    "subnormals",
    "first_nonfinite",
    "absmax",
    "sumsq",
)
"""The eight 8-byte words of a packed record, in order (csrc/record.h). The last two are float64."""


def counts_in_words(nan: int, pos_inf: int, neg_inf: int) -> str:
    """Returns a text such as "2 NaN, 1 +Inf"; "" without non-finite values."""
    kinds = (("NaN", nan), ("+Inf", pos_inf), ("-Inf", neg_inf))
    return ", ".join(f"{count} {kind}" for kind, count in kinds if count)


def shape_in_words(shape: Iterable[int]) -> str:
    """Returns a text such as "384x384"."""
    return "x".join(map(str, shape)) or "scalar"


@dataclass(frozen=True)
class Record:
    """The statistics of one segment, on the host.

    Attributes:
        nan: Number of NaN elements.
        pos_inf: Number of +Inf elements.
        neg_inf: Number of -Inf elements.
        absmax: Largest absolute value among the finite elements, 0 if there are none.
        sumsq: Sum of the squares of the finite elements.
        first_nonfinite: Flat index inside the segment of the first NaN or infinity, or -1.
        zeros: Number of elements that are 0; None without `detail`.
        subnormals: Number of subnormal elements; None without `detail`.
    """

    nan: int
    pos_inf: int
    neg_inf: int
    absmax: float
    sumsq: float
    first_nonfinite: int
    zeros: int | None = None
    subnormals: int | None = None

    @property
    def nonfinite(self) -> int:
        """Number of elements that are NaN or infinite."""
        return self.nan + self.pos_inf + self.neg_inf

    @property
    def norm(self) -> float:
        """L2 norm as in torch: NaN or infinity if there is one."""
        if self.nan:
            return math.nan
        return math.inf if self.nonfinite else math.sqrt(self.sumsq)


class Verdict(str, Enum):
    """Cause of an overflow."""

    SCALE_TOO_HIGH = "scale_too_high"
    WEIGHTS_NONFINITE = "weights_nonfinite"
    UPDATE_NONFINITE = "update_nonfinite"
    OPTIMIZER_STATE_NONFINITE = "optimizer_state_nonfinite"
    INPUT_NONFINITE = "input_nonfinite"
    FORWARD_NONFINITE = "forward_nonfinite"
    LOSS_NONFINITE = "loss_nonfinite"
    BACKWARD_NONFINITE = "backward_nonfinite"
    REDUCTION_OVERFLOW = "reduction_overflow"
    RANK_FAULT = "rank_fault"
    UNDETERMINED = "undetermined"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Offender:
    """A tensor that holds a non-finite value.

    Attributes:
        kind: "parameter", "buffer", "optimizer_state", "input", "activation", "loss", "gradient" or "reduction".
        name: Fully qualified name. An input is named by the model's argument, as in `batch['pixels']`; an activation by
            the module that returned it; a gradient by its parameter, or by the module if an activation's; the loss is
            "loss".
        module: Fully qualified name of the module that owns it, "" for the root.
        rank: Lowest global rank with it; None for a gradient of several ranks, because
            after the reduction all of them see it.
        index: Index of the first non-finite element, in the tensor's own shape.
        nan: Number of NaN elements.
        pos_inf: Number of +Inf elements.
        neg_inf: Number of -Inf elements.
        absmax: Largest absolute value among the finite elements.
        numel: Number of elements of the whole tensor.
        shape: Shape of the whole tensor.
        dtype: Dtype of the tensor, as "float16".
        aliases: Other names of the same tensor (tied weights).
        operation: Name of the operation of torch that made it, as "aten.div.Tensor"; None if unknown.
        line: Line of code that called that operation, or of which that operation is the backward pass, as
            "train.py:12 in loss: x / y"; None if unknown.
        sample: Position in the batch of the first non-finite element; None if unknown.
    """

    kind: str
    name: str
    module: str
    rank: int | None
    index: tuple[int, ...]
    nan: int
    pos_inf: int
    neg_inf: int
    absmax: float
    numel: int
    shape: tuple[int, ...]
    dtype: str
    aliases: tuple[str, ...] = ()
    operation: str | None = None
    line: str | None = None
    sample: int | None = None

    @property
    def nonfinite(self) -> int:
        """Number of elements that are NaN or infinite."""
        return self.nan + self.pos_inf + self.neg_inf

    def __str__(self) -> str:
        position = f"[{', '.join(map(str, self.index))}]" if self.index else ""
        shape = shape_in_words(self.shape)
        where = "" if self.rank is None else f", rank {self.rank}"
        tied = f", tied to {', '.join(self.aliases)}" if self.aliases else ""
        name = self.name if self.kind == "loss" else f"{self.kind} {self.name}"
        return f"{name}{position}: {self.counts} of {self.numel} values ({shape} {self.dtype}{where}{tied})"

    @property
    def counts(self) -> str:
        """The non-finite values in words, for example "2 NaN, 1 +Inf"."""
        return counts_in_words(self.nan, self.pos_inf, self.neg_inf)


@dataclass(frozen=True)
class GradientRecord:
    """This rank's part of one parameter's gradient in a step, before unscaling and clipping.

    Attributes:
        absmax: Largest absolute value among the finite elements.
        norm: L2 norm of the finite elements.
        nonfinite: Number of non-finite elements.
    """

    absmax: float
    norm: float
    nonfinite: int


@dataclass(frozen=True)
class StepRecord:
    """One line of the flight recorder: one optimizer step.

    `absmax`, `norm` and `nonfinite` are of the whole model's gradients, before unscaling and clipping, and the same on
    every rank that holds a slice of them. Only where another rank did not come to that step are they this rank's.

    Attributes:
        step: Number of the step, from 1, as the framework counts (skipped steps too).
        loss: Mean loss of the step's micro-batches on this rank, without the loss scale, and not divided by their
            number; None if the guard could not see it.
        loss_scale: Loss scale in force during the backward pass; 1.0 without loss scaling.
        absmax: Largest absolute value among the finite elements.
        norm: L2 norm, as in torch: NaN or infinite where an element is.
        nonfinite: Number of non-finite elements.
        applied: False if the step was skipped.
        limit: Largest number that gradients of this model can hold, if that is near (float16); else None.
        parameters: Figures of each parameter by name, of what this rank holds of it; empty if only totals were kept.
    """

    step: int
    loss: float | None
    loss_scale: float
    absmax: float
    norm: float
    nonfinite: int
    applied: bool
    limit: float | None = None
    parameters: Mapping[str, GradientRecord] = field(default_factory=dict, compare=False, repr=False)

    @property
    def headroom(self) -> float | None:
        """Doublings until the largest gradient element overflows, in bits; None if overflow is far away."""
        return math.log2(self.limit / self.absmax) if self.limit and self.absmax else None
