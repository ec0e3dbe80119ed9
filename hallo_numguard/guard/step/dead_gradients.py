"""Parameters whose gradients stay zero: a layer that has died, and not one that takes no part, or not yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from hallo_numguard.core.records import StepRecord
from hallo_numguard.guard.module_groups import by_module
from hallo_numguard.guard.named_tensors import NamedTensor

MIN_SAMPLES = 3
FIRST_STEP = 8  # of the warning: what begins behind gates that are zero has moved by then
MIN_SAMPLES_IF_SKIPPED = 11  # up to step 1024, for layers that many steps leave out: experts, and those that were alive
MAX_STEPS_NAMED = 8

Warn = Callable[[int, str, str], None]
"""Called with the step, the message, and the name of a module or parameter."""


class DeadGradients:
    """Finds parameters whose gradients are zero in sample after sample, and tells of them by module.

    Not dead are: embedding tables, of which a batch reads some rows or none; tokens, and parameters of one dimension
    that are zero without a matrix beside them, such as gates and biases that a normalisation cancels; layers that any
    step in between reached (LayerDrop); and experts that got no token in a few steps.

    Args:
        parameters: Parameters in the guard's order.
        model: The model; None if unknown.
        last_steps: Returns the last steps, with the figures of each parameter. Called once in a warning.
        warn: Takes the warnings.
    """

    def __init__(
        self,
        parameters: Sequence[NamedTensor],
        model: nn.Module | None,
        last_steps: Callable[[], Sequence[StepRecord]],
        warn: Warn,
    ) -> None:
        self._parameters = parameters
        self._last_steps = last_steps
        self._tables = _embedding_tables(model)
        self._warn = warn
        self._zero_in: dict[int, list[int]] = {}  # samples in a row in which a gradient was nothing but zeros
        self._alive: set[int] = set()  # whose gradient has been something else before
        self._told: set[int] = set()

    def check(self, step: int, absmax: Mapping[int, float]) -> None:
        """Takes a sample, and warns of what is dead for the first time.

        Args:
            step: Number of the step.
            absmax: Largest absolute value of each parameter's gradient, by position.
        """
        for position, largest in absmax.items():
            self._note(step, position, largest)
        due = [position for position in absmax if self._is_due(position)] if step >= FIRST_STEP else []
        if not self._told.issuperset(due):
            due = self._without_moving(due)
            self._tell(step, due, absmax)

    def _note(self, step: int, position: int, largest: float) -> None:
        if largest > 0:
            self._alive.add(position)
            self._told.discard(position)
            self._zero_in.pop(position, None)
        else:
            self._zero_in.setdefault(position, []).append(step)

    def _is_due(self, position: int) -> bool:
        may_be_skipped = position in self._alive or "expert" in self._parameters[position].name
        samples = MIN_SAMPLES_IF_SKIPPED if may_be_skipped else MIN_SAMPLES
        return len(self._zero_in.get(position, ())) >= samples

    def _without_moving(self, due: Sequence[int]) -> list[int]:
        """Leaves out those that a step between two samples has reached."""
        names = {self._parameters[position].name: position for position in due}
        for row in [step.parameters for step in self._last_steps() if step.applied]:
            for name in [name for name in names if name in row and row[name].absmax > 0]:
                position = names.pop(name)
                self._alive.add(position)
                self._zero_in.pop(position, None)
        return list(names.values())

    def _tell(self, step: int, due: Sequence[int], known: Mapping[int, float]) -> None:
        positions = {self._parameters[position].name: position for position in due}
        for module, names in by_module(list(positions), [self._parameters[at].name for at in known]).items():
            group = [positions[name] for name in names]
            if self._told.issuperset(group) or not any(map(self._is_layer, group)):
                continue
            self._told.update(group)
            steps = min((self._zero_in[position] for position in group), key=len)
            when = ", ".join(map(str, steps[-MAX_STEPS_NAMED:]))
            if len(group) == 1:
                self._warn(step, f"the gradient of {names[0]} was zero throughout in steps {when}", names[0])
            else:
                where = module or "the model"
                message = f"{len(group)} parameters of {where} had gradients of zero throughout in steps {when}"
                self._warn(step, message, module)

    def _is_layer(self, position: int) -> bool:
        """Whether it is a layer's matrix, which takes part in every step unless something is wrong."""
        item = self._parameters[position]
        owner, own = ["", *item.name.split(".")][-2:]
        if self._tables.intersection((item.name, *item.aliases)) or "embed" in owner + own or "token" in own:
            return False
        return len(item.whole_shape) > 1 and (own == "weight" or sum(size > 1 for size in item.whole_shape) > 1)


def _embedding_tables(model: nn.Module | None) -> set[str]:
    """Names of the model's parameters that are embedding tables."""
    if model is None:
        return set()
    modules = model.named_modules(remove_duplicate=False)
    tables = [name for name, module in modules if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
    return {f"{name}.weight".lstrip(".") for name in tables}
