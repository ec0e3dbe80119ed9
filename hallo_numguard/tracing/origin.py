"""Where a trace first turned from finite to non-finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hallo_numguard.core.frames import Frame, Origin, TensorRecord
from hallo_numguard.core.records import Record
from hallo_numguard.tracing.tape import Tape, TensorSnapshot

Named = tuple[str, TensorSnapshot]

LARGEST_MEASURED = 1e4  # masks that are added hold 0 and -Inf, or one large negative number


@dataclass(eq=False)
class TracedCall:
    """A call of a module under a trace: the raw form of a `Frame`.

    Attributes:
        name, cls, call, parent, inputs, weights, outputs: The fields of `Frame`.
        parameters: Names of the weights that are parameters.
        position: Position in the order of completion; -1 until then.
        operations: Operations of the call itself, without those of inner modules.
    """

    name: str
    cls: str
    call: int
    parent: TracedCall | None
    inputs: Sequence[Named] = ()
    weights: Sequence[Named] = ()
    parameters: frozenset[str] = frozenset()
    outputs: Sequence[Named] = ()
    position: int = -1
    operations: list[Operation] = field(default_factory=list)


@dataclass(eq=False)
class Operation:
    """One operator of torch, called inside of a module.

    Attributes:
        what: Name of the operator, and the line that called it.
        inputs, outputs: Snapshots of its tensor arguments and results.
    """

    what: str
    inputs: Sequence[TensorSnapshot]
    outputs: Sequence[TensorSnapshot]


def frame_of(call: TracedCall, tape: Tape) -> Frame:
    """Returns the call as a frame with its records."""

    def records(named: Sequence[Named]) -> tuple[TensorRecord, ...]:
        return tuple(tape.tensor_record(name, held) for name, held in named)

    def gradients(named: Sequence[Named]) -> tuple[TensorRecord, ...]:
        return records([(name, held.gradient) for name, held in named if held.gradient is not None])

    return Frame(
        position=call.position,
        name=call.name,
        cls=call.cls,
        call=call.call,
        parent=None if call.parent is None else call.parent.position,
        inputs=records(call.inputs),
        weights=records(call.weights),
        outputs=records(call.outputs),
        grad_outputs=gradients(call.outputs),
        grad_inputs=gradients(call.inputs),
        grad_weights=gradients(call.weights),
    )


def first_nonfinite(calls: Sequence[TracedCall], tape: Tape) -> Origin | None:
    """Finds the first call that turned finite into non-finite: in the forward pass, else in the backward pass.

    Calls are in the order of completion, so the innermost of several comes first. -Inf alone does not count, as masks
    hold it, unless it became NaN: then the call that made the -Inf is named.
    """
    if tape.bad == 0:
        return None
    return first_in_forward(calls, tape) or first_in_backward(calls, tape)


# -- forward ----------------------------------------------------------------------------------------------------------


def first_in_forward(calls: Sequence[TracedCall], tape: Tape) -> Origin | None:
    """Finds the first call whose outputs are not finite, although all its inputs are."""
    bad_input: tuple[TracedCall, Named] | None = None
    for call in calls:
        output = _first_bad(call.outputs, tape)
        if output is None:
            continue
        weight = _bad_weight(call, tape, "forward")
        if weight is not None:
            return weight
        given = _first_bad(call.inputs, tape)
        if given is None:
            maker = _source_of_neg_inf(call, calls, tape)
            if maker is not None:
                return _origin(maker[0], tape, "forward", "activation", maker[1], maker[0].name)
            measured = _measured_neg_inf(call, tape)
            if measured is not None:
                return _came_in(call, measured, tape)
            return _origin(call, tape, "forward", "activation", output, call.name)
        if bad_input is None and given[1].made_by is None:
            bad_input = (call, given)
    return None if bad_input is None else _came_in(*bad_input, tape)


def _came_in(call: TracedCall, given: Named, tape: Tape) -> Origin:
    """Origin for an input that was bad already: an input of the model, or made by a module's own code for this call."""
    while call.parent is not None:
        if not any(held is given[1] for _, held in call.parent.inputs):
            return _origin(call.parent, tape, "forward", "activation", given, call.parent.name)
        call = call.parent
    given = next(item for item in call.inputs if item[1] is given[1])
    return _origin(call, tape, "forward", "input", given, given[0])


def _source_of_neg_inf(call: TracedCall, calls: Sequence[TracedCall], tape: Tape) -> tuple[TracedCall, Named] | None:
    """A call with weights whose overflow to -Inf this call turned into NaN."""
    for _, held in call.inputs:
        if held.made_by is None or tape.record(held).neg_inf == 0:
            continue
        maker = next((item for item in calls if item.position == held.made_by), None)
        if maker is not None and maker.weights and not any(tape.record(item).neg_inf for _, item in maker.inputs):
            return maker, next(named for named in maker.outputs if named[1] is held)
    return None


def _measured_neg_inf(call: TracedCall, tape: Tape) -> Named | None:
    """An input that no module made, with -Inf among ordinary numbers: a logarithm of 0, and no mask."""
    for name, held in call.inputs:
        record = tape.record(held)
        if held.made_by is None and record.neg_inf > 0 and 0 < record.absmax < LARGEST_MEASURED:
            return name, held
    return None


# -- backward ---------------------------------------------------------------------------------------------------------


def first_in_backward(calls: Sequence[TracedCall], tape: Tape) -> Origin | None:
    """Finds the earliest call whose outputs had finite gradients, and whose other gradients were not finite."""
    best: tuple[int, int, TracedCall, Named] | None = None
    for call in calls:
        if any(_is_bad_gradient(tape.record(held.gradient)) for _, held in call.outputs if held.gradient is not None):
            continue
        for name, held in (*call.weights, *call.inputs):
            gradient = held.gradient
            if gradient is None or not _is_bad_gradient(tape.record(gradient)):
                continue
            if best is None or (gradient.order, call.position) < best[:2]:
                best = (gradient.order, call.position, call, (name, gradient))
    between = _between_modules(calls, tape)
    if between is not None and (best is None or between[0] < best[0]):
        return _origin(between[1], tape, "backward", "gradient", between[2], between[1].name)
    if best is None:
        return None
    _, _, call, (name, gradient) = best
    # Where a weight was bad, the loss did not depend on it, but 0 times NaN is NaN.
    weight = _bad_weight(call, tape, "backward")
    return weight or _origin(call, tape, "backward", "gradient", (name, gradient), call.name)


def _between_modules(calls: Sequence[TracedCall], tape: Tape) -> tuple[int, TracedCall, Named] | None:
    """The first bad gradient of an output that no module made: it comes from the caller's own code."""
    first: tuple[int, TracedCall, Named] | None = None
    taken = {held for call in calls for _, held in call.inputs}
    for call in calls:
        for name, held in call.outputs:
            gradient = held.gradient
            if gradient is None or held in taken or call.parent is None:
                continue
            if _is_bad_gradient(tape.record(gradient)) and (first is None or gradient.order < first[0]):
                first = (gradient.order, call.parent, (f"{name} of {call.name}", gradient))
    return first


# -- both -------------------------------------------------------------------------------------------------------------


def _bad_weight(call: TracedCall, tape: Tape, phase: str) -> Origin | None:
    weight = _first_bad(call.weights, tape)
    if weight is None:
        return None
    kind = "parameter" if weight[0] in call.parameters else "buffer"
    return _origin(call, tape, phase, kind, weight, f"{call.name}.{weight[0]}".lstrip("."))


def _first_bad(named: Sequence[Named], tape: Tape) -> Named | None:
    return next((item for item in named if _is_bad(tape.record(item[1]))), None)


def _is_bad(record: Record) -> bool:
    return record.nan > 0 or record.pos_inf > 0


def _is_bad_gradient(record: Record) -> bool:
    return record.nonfinite > 0


def _origin(call: TracedCall, tape: Tape, phase: str, kind: str, named: Named, name: str) -> Origin:
    tensor = tape.tensor_record(*named)
    return Origin(
        name=name,
        module=call.cls,
        phase=phase,
        call=call.call,
        index=tensor.index,
        kind=kind,
        tensor=tensor,
        position=call.position,
        neighbours=tape.neighbours.get(named[1].row, ()),
        operation=_operation(call, tape) if kind == "activation" else "",
    )


def _operation(call: TracedCall, tape: Tape) -> str:
    """The first operation inside of the call that turned finite into non-finite."""
    for operation in call.operations:
        made = any(_is_bad(tape.record(held)) for held in operation.outputs)
        if made and not any(_is_bad(tape.record(held)) for held in operation.inputs):
            return operation.what
    return ""
