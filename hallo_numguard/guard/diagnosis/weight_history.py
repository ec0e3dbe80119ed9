"""Who wrote a weight that is not finite: what the looks around the updates have shown of it, in facts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hallo_numguard.guard.named_tensors import NamedTensor
from hallo_numguard.guard.optimizer_view import OptimizerView, StatePart, WeightState
from hallo_numguard.guard.step.updates import UpdateWatch, WrittenWeight, fits, numbers_in
from hallo_numguard.ops.formats import dtype_name

MAX_ODD = 4  # sentences
LARGE_LR = 100.0
LARGE_DECAY = 1.0  # of learning rate times weight decay: beyond it the decay turns the weight's sign
_SHOWN = (
    "lr",
    "betas",
    "beta2",
    "beta2_decay",
    "eps",
    "weight_decay",
    "momentum",
    "dampening",
    "nesterov",
    "alpha",
    "rho",
    "lr_decay",
    "amsgrad",
    "maximize",
    "capturable",
    "fused",
    "foreach",
    "step",
)
"""Settings that a report shows, if a group has them, in this order."""

_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf", "acc_delta")


@dataclass(frozen=True)
class Update:
    """The update that was made on a weight, as it was read right there.

    Attributes:
        optimizer: Class of the optimizer.
        group: Number of the parameter group; None if unknown.
        group_name: Name of the group, "" if it has none.
        settings: The group's settings, as "lr=nan, eps=1e-08".
        odd: Sentences on what is odd in settings or state.
        advice: What to do about the first of them; "" if nothing is odd.
        at_element: What the optimizer keeps for the weight's first bad element, as "gradient 0, exp_avg 0".
        master: Sentence on the master copy; "" if there is none.
        has_bad_settings: Whether a setting of the group is NaN or infinite.
        has_bad_moment: Whether a moment holds a NaN that finite settings and gradients cannot have made.
        has_bad_gradients: Whether gradients of that step were not finite, on this rank, and were applied all the same.
    """

    optimizer: str
    group: int | None
    group_name: str
    settings: str
    odd: tuple[str, ...]
    advice: str
    at_element: str
    master: str
    has_bad_settings: bool
    has_bad_moment: bool
    has_bad_gradients: bool


@dataclass(frozen=True)
class WeightHistory:
    """What is known of who wrote a weight that is not finite.

    Attributes:
        name: Name of the weight.
        by_update: Number of the step whose update wrote it: seen finite right before, and not right after; 0 if none.
        before_update: Number of the step before whose update it was seen bad, after none was seen to write it; or 0.
        finite_at: Last step after whose update it was seen finite; 0 when attached or loaded; -1 if it never was.
        last_update: Number of the last step that was applied; 0 if none was.
        when: When it was read outside of a step, as in "attached"; "" if it never was.
        was_so: Whether it was not finite already then.
        is_trained: Whether the optimizer trains it.
        in_no_file: Whether it is a buffer that no state dict has.
        update: The update that wrote it, or the last one; None if it is not trained.
    """

    name: str
    by_update: int = 0
    before_update: int = 0
    finite_at: int = -1
    last_update: int = 0
    when: str = ""
    was_so: bool = False
    is_trained: bool = False
    in_no_file: bool = False
    update: Update | None = None

    @property
    def is_by_update(self) -> bool:
        """Whether an update was seen to write it, from finite gradients."""
        return self.by_update > 0 and self.update is not None and not self.update.has_bad_gradients

    @property
    def is_by_other_code(self) -> bool:
        """Whether it was seen finite after the last update: no update wrote it."""
        return not self.was_so and not self.by_update and self.finite_at == self.last_update


def history_of(written: WrittenWeight, item: NamedTensor, watch: UpdateWatch, view: OptimizerView) -> WeightHistory:
    """Returns the history of a trained weight. Reads the optimizer's state: not for the hot path."""
    return WeightHistory(
        item.name,
        by_update=written.by_update,
        before_update=written.before_update,
        finite_at=written.finite_at,
        last_update=written.last_update,
        when=watch.when,
        was_so=watch.was_bad_from_the_start(written.position),
        is_trained=True,
        update=_update(written, item, watch.first_bad_element(written.position), view),
    )


def _update(written: WrittenWeight, item: NamedTensor, element: int, view: OptimizerView) -> Update:
    number = view.group_of(item.tensor)
    settings: Mapping[str, Any] = written.groups[number] if number is not None and number < len(written.groups) else {}
    state = view.state_of(item.tensor)
    element = max(element, 0)
    gradients = written.gradients
    changed = _changed_gradient(item, element) if gradients is not None else []
    found = [*_odd_settings(settings), *changed, *_odd(settings, state, item, element)]
    bad_states = [part for part in state.parts if not part.is_master and bool(part.values.isnan().any())]
    return Update(
        view.name(),
        number,
        str(settings.get("name") or settings.get("group_name") or ""),
        _settings_text(settings, state),
        tuple(sentence for sentence, _ in found[:MAX_ODD]),
        found[0][1] if found else "",
        _at_element(state, item, element),
        _master_text(state, item),
        has_bad_settings=any(_nonfinite_settings(settings)),
        has_bad_moment=bool(bad_states) and not any(_nonfinite_settings(settings)),
        has_bad_gradients=gradients is not None and bool(gradients.any_nonfinite()),
    )


def _settings_text(settings: Mapping[str, Any], state: WeightState) -> str:
    shown = [f"{name}={_value_text(settings[name])}" for name in _SHOWN if settings.get(name) is not None]
    rest = [
        f"{name}={_value_text(value)}"
        for name, value in settings.items()
        if name not in _SHOWN and name != "initial_lr" and isinstance(value, float)
    ]
    texts = [*shown, *rest[:6]]
    if "step" in state.numbers:
        texts.append(f"step counter {state.numbers['step']:g} after it")
    return ", ".join(texts)


def _value_text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.item():g}" if value.numel() == 1 else "a tensor"
    return f"{value:g}" if isinstance(value, float) else str(value)[:60]


def _at_element(state: WeightState, item: NamedTensor, element: int) -> str:
    texts = []
    gradient = _gradient_at(item, element)
    texts += [] if gradient is None else [f"gradient {gradient:g}"]
    for part in state.parts:
        value = _value_at(part, element)
        texts += [] if value is None else [f"{part.name} {value:g}"]
    return ", ".join(texts[:6])


def _gradient_at(item: NamedTensor, element: int) -> float | None:
    gradient = item.tensor.grad if item.tensor.is_leaf else None
    if gradient is None or gradient.is_sparse:
        return None
    local: torch.Tensor = getattr(gradient, "_local_tensor", gradient)
    return _value_at(StatePart("gradient", local.detach().reshape(-1)), element)


def _value_at(part: StatePart, element: int) -> float | None:
    place = element - part.start
    if not 0 <= place < part.values.numel() or not part.values.is_floating_point():
        return None
    return float(part.values[place])


def _master_text(state: WeightState, item: NamedTensor) -> str:
    masters = [part for part in state.parts if part.is_master and part.values.is_floating_point()]
    if not masters:
        return ""
    kind, copy = dtype_name(masters[0].values.dtype), dtype_name(item.tensor.dtype)
    if any(not bool(part.values.isfinite().all()) for part in masters):
        return f"its {kind} master copy, which takes the updates, is not finite either"
    largest = max((float(part.values.abs().max()) for part in masters if part.values.numel()), default=0.0)
    limit = torch.finfo(item.tensor.dtype).max
    if largest > limit:
        return (
            f"its {kind} master copy is finite and reaches {largest:.4g}: more than {copy} holds ({limit:g}), so the "
            "copy that the model reads became Inf"
        )
    return f"its {kind} master copy is finite: the fault is in the {copy} copy alone"


# -- what is odd -------------------------------------------------------------------------------------------------------


def _nonfinite_settings(settings: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in settings.items():
        if name not in ("params", "param_names"):
            yield from ((key, number) for key, number in numbers_in(name, value) if not math.isfinite(number))
    rate = settings.get("lr")
    if isinstance(rate, torch.Tensor) and rate.device.type != "cpu" and rate.numel() == 1 and not rate.isfinite():
        yield "lr", float(rate)


def _odd(settings: Mapping[str, Any], state: WeightState, item: NamedTensor, element: int) -> Iterator[tuple[str, str]]:
    """Sentences on what is odd, each with its remedy, the most telling first."""
    yield from _odd_correction(settings, state)
    yield from _odd_eps(settings, state, item, element)
    yield from _odd_moments(state, element)
    yield from _odd_sizes(settings, state, item, element)


def _odd_settings(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in _nonfinite_settings(settings):
        text = "NaN" if math.isnan(value) else f"{value:+g}".replace("inf", "Inf")
        yield f"{name} is {text}", _mend_setting(name)


def _changed_gradient(item: NamedTensor, element: int) -> list[tuple[str, str]]:
    """A sentence on a gradient that was finite when it was checked, and is not after the update."""
    value = _gradient_at(item, element)
    if value is None or math.isfinite(value):
        return []
    text = (
        f"the gradient of the first bad element is {value:g} after the update, and was finite when it was checked "
        "before it: clipping, a hook or the optimizer itself has changed it in between"
    )
    return [(text, "Look for what changes gradients right before the update: a step hook, clipping, a scaler.")]


def _mend_setting(name: str) -> str:
    if name == "lr":
        return (
            "Mend what sets the learning rate: print it from the scheduler for every step before training (a warm-up "
            "of 0 steps, a division by the number of steps, a metric that is NaN)."
        )
    return f"Mend what sets {name} of that parameter group: the scheduler, the configuration, or what was loaded."


def _odd_correction(settings: Mapping[str, Any], state: WeightState) -> Iterator[tuple[str, str]]:
    step = state.numbers.get("step", settings.get("step"))
    if isinstance(step, torch.Tensor):
        step = float(step)
    if not isinstance(step, (int, float)):
        return
    mend = (
        "Start the optimizer's state anew, or load the one that belongs to the weights: a step counter is 1 after the "
        "first update, and every beta is below 1."
    )
    if step < 1:
        yield f"the step counter is {step:g} after the update: it begins at 0, and the update adds 1", mend
    for name, beta in numbers_in("betas", settings.get("betas")):
        if math.isfinite(beta) and beta >= 1:
            yield f"{name} is {beta:g}: 1 - beta^step, which the bias correction divides by, is 0 or negative", mend
        elif 0 < beta < 1 and step == 0:
            yield f"the bias correction of {name} is 1 - {beta:g}^0 = 0, and the update is divided by it", mend


def _odd_eps(
    settings: Mapping[str, Any], state: WeightState, item: NamedTensor, element: int
) -> Iterator[tuple[str, str]]:
    eps = settings.get("eps")
    second = next((part for part in state.parts if part.name in _SECOND_MOMENTS), None)
    rate = settings.get("lr")
    is_zero_rate = isinstance(rate, torch.Tensor) and rate.numel() == 1 and float(rate) == 0
    if is_zero_rate and settings.get("capturable"):
        yield (
            "lr is 0 and capturable is set: torch then divides the second moment by it",
            "Use a learning rate above 0, or capturable=False.",
        )
    if not isinstance(eps, float) or not math.isfinite(eps):
        return
    dtype = item.tensor.dtype if second is None else second.values.dtype
    value = None if second is None else _value_at(second, element)
    there = "; where the second moment is 0 the update divides by 0"
    if second is not None and value is not None:
        there = f"; {second.name} of the first bad element is {value:g}"
        there += ", and the update divides by its root plus eps" if value == 0 else ""
    name = dtype_name(dtype)
    if eps < 0:
        yield f"eps is {eps:g}, below 0{there}", "Use an eps above 0."
    elif eps == 0 and value in (0.0, None):
        yield f"eps is 0{there}", f"Use an eps above 0 ({_eps_for(dtype)} in {name})."
    elif eps > 0 and not fits(eps, dtype) and value in (0.0, None):
        yield (
            f"eps={eps:g} is 0 in {name}{there}",
            (
                f"Use an eps that {name} holds (1e-4), or better keep weights in float32 and compute in {name} by "
                "autocast."
            ),
        )


def _eps_for(dtype: torch.dtype) -> str:
    return "1e-4" if dtype is torch.float16 else "1e-8"


def _odd_moments(state: WeightState, element: int) -> Iterator[tuple[str, str]]:
    mend = "Reset the optimizer's state, or load one that belongs to these weights and was not converted."
    for part in state.parts:
        value = _value_at(part, element)
        if part.is_master or value is None:
            continue
        if part.name in _SECOND_MOMENTS and value < 0:
            yield f"{part.name} of the first bad element is {value:g}: a second moment is not negative", mend
        elif math.isinf(value):
            name = dtype_name(part.values.dtype)
            yield f"{part.name} of the first bad element is {value:g}: more than {name} holds", mend


def _odd_sizes(
    settings: Mapping[str, Any], state: WeightState, item: NamedTensor, element: int
) -> Iterator[tuple[str, str]]:
    numbers = {
        name: dict(numbers_in(name, settings.get(name))).get(name) for name in ("lr", "weight_decay", "momentum")
    }
    rate, decay, momentum = numbers["lr"], numbers["weight_decay"], numbers["momentum"]
    if rate is not None and math.isfinite(rate):
        if abs(rate) >= LARGE_LR:
            dtype = item.tensor.dtype
            limit = torch.finfo(dtype).max if dtype.is_floating_point else math.inf
            yield (
                f"lr is {rate:g} ({dtype_name(dtype)} holds numbers up to {limit:.4g})",
                "Lower the learning rate, and look at what sets it.",
            )
        elif rate < 0:
            yield f"lr is {rate:g}, below 0", "Mend what sets the learning rate."
        if decay is not None and math.isfinite(decay) and abs(rate * decay) > LARGE_DECAY:
            yield (
                f"weight_decay is {decay:g}, and {rate * decay:g} when it is multiplied by lr",
                "Lower weight_decay: lr times weight_decay has to be far below 1.",
            )
    if momentum is not None and math.isfinite(momentum) and momentum >= 1:
        yield f"momentum is {momentum:g}: what it adds up only grows", "Use a momentum below 1."
