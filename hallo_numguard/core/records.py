"""The vocabulary that every room shares. Standard library only: reports are read where torch is not installed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

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
    """Returns for example "2 NaN, 1 +Inf"; "" if there are none."""
    kinds = (("NaN", nan), ("+Inf", pos_inf), ("-Inf", neg_inf))
    return ", ".join(f"{count} {kind}" for kind, count in kinds if count)


def shape_in_words(shape: Iterable[int]) -> str:
    """Returns for example "384x384"."""
    return "x".join(map(str, shape)) or "scalar"


@dataclass(frozen=True)
class Record:
    """The statistics of one segment, on the host.

    Attributes:
        nan, pos_inf, neg_inf: Number of such elements.
        absmax: Largest absolute value among the finite elements, 0 if there are none.
        sumsq: Sum of the squares of the finite elements.
        first_nonfinite: Flat index inside the segment of the first NaN or infinity, or -1.
        zeros, subnormals: Number of such elements; None unless they were asked for.
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
        """L2 norm as torch would give it: NaN or infinity where there is one."""
        if self.nan:
            return math.nan
        return math.inf if self.nonfinite else math.sqrt(self.sumsq)


class Verdict(str, Enum):
    """What an overflow means."""

    SCALE_TOO_HIGH = "scale_too_high"
    WEIGHTS_NONFINITE = "weights_nonfinite"
    OPTIMIZER_STATE_NONFINITE = "optimizer_state_nonfinite"
    INPUT_NONFINITE = "input_nonfinite"
    FORWARD_NONFINITE = "forward_nonfinite"
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
        name: Fully qualified name; of an input the argument of the model, as in `batch['pixels']`; of an activation the
            module that returned it; of a gradient the parameter, or the module if it is that of an activation; "loss"
            for the loss.
        module: Fully qualified name of the module that owns it, "" for the root.
        rank: Global rank on which it was seen, the lowest if on several; None for a gradient of several ranks, because
            after the reduction all of them see it.
        index: Of the first non-finite element, in the tensor's own shape.
        nan, pos_inf, neg_inf: Number of such elements.
        absmax: Largest absolute value among the finite elements.
        numel, shape, dtype: Of the whole tensor.
        aliases: Other names of the same tensor (tied weights).
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

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Offender:
        """Returns the offender that `dataclasses.asdict` was made of, after it has been through JSON.

        Raises:
            KeyError, TypeError, ValueError: If it is none.
        """
        values = dict(document)
        for name in ("kind", "name", "module", "dtype"):
            values[name] = str(values[name])
        for name in ("nan", "pos_inf", "neg_inf", "numel"):
            values[name] = int(values[name])
        for name in ("index", "shape"):
            values[name] = tuple(map(int, values[name]))
        values["aliases"] = tuple(map(str, values["aliases"]))
        values["rank"] = None if values["rank"] is None else int(values["rank"])
        values["absmax"] = float(values["absmax"])
        return cls(**values)


@dataclass(frozen=True)
class GradientRecord:
    """What this rank held of one parameter's gradient in a step, before unscaling and clipping.

    Attributes:
        absmax, norm: Of the finite elements.
        nonfinite: Number of the others.
    """

    absmax: float
    norm: float
    nonfinite: int


@dataclass(frozen=True)
class StepRecord:
    """One line of the flight recorder: what this rank owned in one optimizer step.

    Attributes:
        step: Number of the step, from 1, as DeepSpeed counts (skipped steps too).
        loss: Last micro-batch's loss, unscaled; None if the guard could not see it.
        loss_scale: In force during the backward pass; 1.0 without loss scaling.
        absmax, norm: Of the finite elements of this rank's gradients, before unscaling and clipping.
        nonfinite: Number of non-finite elements of this rank's gradients.
        applied: False if the step was skipped.
        limit: Largest number that gradients of this model can hold, where that is near (float16); else None.
        parameters: The same by name of the parameter; empty where only the sums were kept.
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
        """How often the largest gradient element could be doubled before it overflows, in bits; None if far away."""
        return math.log2(self.limit / self.absmax) if self.limit and self.absmax else None
