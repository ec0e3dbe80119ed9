"""The table of causes: functions that are finite, and have finite gradients, until one sample of a batch is special.

Each takes activations y [batch, features] and a dial [batch, 1], which is 1 for an ordinary sample and 0 for the
special one. What it computes with depends on y, so that gradients flow through it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from causes.cases import DTYPES, EXECUTIONS, PLACES, SAMPLE, WORLDS, Expected

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

REACHES = "reaches the loss"
HIDDEN = "is hidden from the loss"
BACKWARD = "is made in the backward pass"


@dataclass(frozen=True)
class Cause:
    """A cause.

    Attributes:
        name: Name in tests and tables.
        function: See above.
        effect: What becomes of the non-finite value: REACHES, HIDDEN or BACKWARD.
        operations: Names of the operation that makes it, without namespace; any of them is right.
        dtypes: Dtypes in which it happens.
        compiles: Whether torch.compile takes it as a whole.
    """

    name: str
    function: Function
    effect: str
    operations: tuple[str, ...]
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")
    compiles: bool = True

    def __str__(self) -> str:
        return self.name


def _of(y: torch.Tensor, dial: torch.Tensor) -> torch.Tensor:
    """The dial, in the shape of y, and with a gradient to it."""
    return dial + 0 * y


def _forward(operation: Callable[[torch.Tensor], torch.Tensor]) -> Function:
    return lambda y, dial: y + operation(_of(y, dial))


def _largest(y: torch.Tensor) -> float:
    return torch.finfo(y.dtype).max


def _masked(y: torch.Tensor, dial: torch.Tensor) -> torch.Tensor:
    return y.masked_fill(dial == 0, float("-inf"))


def _masked_by_addition(y: torch.Tensor, dial: torch.Tensor) -> torch.Tensor:
    return y + torch.where(dial == 0, float("-inf"), 0.0).to(y.dtype)


def _attention(y: torch.Tensor, dial: torch.Tensor) -> torch.Tensor:
    scores = y[:, None, :] * y[:, :, None]
    weights = scores.masked_fill((dial == 0)[:, :, None], float("-inf")).softmax(-1)
    return y + (weights * y[:, None, :]).sum(-1)


def _times(y: torch.Tensor, dial: torch.Tensor) -> torch.Tensor:
    return (y + 1) * (1 + (1 - dial) * (0.9 * _largest(y))) * 4


def _matrix_product(y: torch.Tensor, dial: torch.Tensor) -> torch.Tensor:
    large = torch.full((y.shape[1], y.shape[1]), 0.9 * _largest(y), dtype=y.dtype, device=y.device)
    return y + ((1 - _of(y, dial)) @ large)


def _mean_of_none(y: torch.Tensor, dial: torch.Tensor) -> torch.Tensor:
    return y + y[(dial.min() > 0.5).expand(len(y))].mean()


def _deviation_of_one(y: torch.Tensor, dial: torch.Tensor) -> torch.Tensor:
    return y + y[: 1 + int(dial.min() * 3), 0].std()


def _whole_layer_norm(y: torch.Tensor, dial: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(y * dial, y.shape[1:], eps=0.0)


def _singular_vectors(y: torch.Tensor, dial: torch.Tensor) -> torch.Tensor:
    values = torch.arange(4, device=y.device) * dial.min() + 1
    return y + torch.linalg.svd(torch.diag_embed(values) + 0 * y[:4, :4])[0].sum()


def _eigenvectors(y: torch.Tensor, dial: torch.Tensor) -> torch.Tensor:
    values = torch.arange(4, device=y.device) * dial.min() + 1
    return y + torch.linalg.eigh(torch.diag_embed(values) + 0 * y[:4, :4])[1].sum()


class _Reciprocal(torch.autograd.Function):
    """The identity; its backward pass divides by the dial."""

    @staticmethod
    def forward(ctx, y, dial):
        ctx.save_for_backward(dial)
        return y * 1

    @staticmethod
    def backward(ctx, gradient):
        (dial,) = ctx.saved_tensors
        return gradient / dial, None


class _Constant(torch.autograd.Function):
    """The identity; its backward pass writes a NaN where the dial is 0."""

    @staticmethod
    def forward(ctx, y, dial):
        ctx.save_for_backward(dial)
        return y * 1

    @staticmethod
    def backward(ctx, gradient):
        (dial,) = ctx.saved_tensors
        gradient = gradient.clone()
        if dial.min() == 0:
            gradient[0, 0] = float("nan")
        return gradient, None


FULL = ("fp32",)
WIDE = ("fp32", "bf16")

CAUSES = [
    # -- it reaches the loss
    Cause("x / 0", lambda y, d: (y + 1) / _of(y, d), REACHES, ("div",)),
    Cause("0 / 0", lambda y, d: (y * d) / _of(y, d), REACHES, ("div",)),
    Cause("a norm that divides", lambda y, d: (y * d) / (y * d).norm(dim=1, keepdim=True), REACHES, ("div",)),
    Cause("1 / 0", lambda y, d: (y + 1) * _of(y, d).reciprocal(), REACHES, ("reciprocal",)),
    Cause("addcdiv", lambda y, d: torch.addcdiv(y, y + 1, _of(y, d)), REACHES, ("addcdiv", "div")),
    Cause("remainder", lambda y, d: y + torch.remainder(y.detach(), d) + 0 * y, REACHES, ("remainder",)),
    Cause("log of 0", _forward(torch.log), REACHES, ("log",)),
    Cause("log of a negative number", _forward(lambda z: torch.log(z - 0.5)), REACHES, ("log",)),
    Cause("log1p of -1", _forward(lambda z: torch.log1p(z - 1)), REACHES, ("log1p",)),
    Cause("log2 of 0", _forward(torch.log2), REACHES, ("log2",)),
    Cause("sqrt of a negative number", _forward(lambda z: torch.sqrt(z - 0.5)), REACHES, ("sqrt",)),
    Cause("rsqrt of 0", lambda y, d: (y + 1) * torch.rsqrt(_of(y, d)), REACHES, ("rsqrt",)),
    Cause("a negative number to the power of 1.5", _forward(lambda z: (z - 0.5) ** 1.5), REACHES, ("pow",)),
    Cause("0 to the power of -1.5", _forward(lambda z: z**-1.5), REACHES, ("pow",)),
    Cause("exp", _forward(lambda z: torch.exp((1 - z) * 200)), REACHES, ("exp",)),
    Cause("exp - exp", _forward(lambda z: torch.exp((1 - z) * 200) - torch.exp((1 - z) * 200)), REACHES, ("exp",)),
    Cause("cosh", _forward(lambda z: torch.cosh((1 - z) * 200)), REACHES, ("cosh",)),
    Cause("expm1", _forward(lambda z: torch.expm1((1 - z) * 200)), REACHES, ("expm1",)),
    Cause("acos of 2", _forward(lambda z: torch.acos(2 - 1.5 * z)), REACHES, ("acos",)),
    Cause("atanh of 1", _forward(lambda z: torch.atanh(1 - z)), REACHES, ("atanh",)),
    Cause("erfinv of 1", _forward(lambda z: torch.erfinv(1 - z)), REACHES, ("erfinv",), FULL),
    Cause("logit of 0", _forward(lambda z: torch.logit(z * 0.5)), REACHES, ("logit",)),
    Cause("lgamma of 0", _forward(torch.lgamma), REACHES, ("lgamma",), FULL),
    Cause("a row that is masked", lambda y, d: y + _masked(y, d).softmax(-1), REACHES, ("_softmax",)),
    Cause("a mask that is added", lambda y, d: y + _masked_by_addition(y, d).softmax(-1), REACHES, ("_softmax",)),
    Cause("log_softmax of a masked row", lambda y, d: y + _masked(y, d).log_softmax(-1), REACHES, ("_log_softmax",)),
    Cause("attention to nothing", _attention, REACHES, ("_softmax",)),
    Cause("a product", _times, REACHES, ("mul", "add")),
    Cause("a matrix product", _matrix_product, REACHES, ("mm", "addmm", "bmm"), WIDE),
    Cause("a cast to float16", _forward(lambda z: ((1 - z) * 1e5).half().to(z.dtype)), REACHES, ("_to_copy",), WIDE),
    Cause("the mean of nothing", _mean_of_none, REACHES, ("mean",), compiles=False),
    Cause("the deviation of one value", _deviation_of_one, REACHES, ("std",), compiles=False),
    Cause("layer_norm without eps", _whole_layer_norm, REACHES, ("native_layer_norm",)),
    # -- the loss does not see it
    Cause("division, then where", lambda y, d: torch.where(d > 0, y / _of(y, d), y), HIDDEN, ("div",)),
    Cause("log, then where", lambda y, d: torch.where(d > 0, y + _of(y, d).log(), y), HIDDEN, ("log",)),
    Cause("sqrt, then where", lambda y, d: torch.where(d > 0, y + (_of(y, d) - 0.5).sqrt(), y), HIDDEN, ("sqrt",)),
    Cause("exp, then clamp", _forward(lambda z: torch.exp((1 - z) * 200).clamp(max=2)), HIDDEN, ("exp",)),
    Cause(
        "exp, then minimum",
        _forward(lambda z: torch.minimum(torch.exp((1 - z) * 200), torch.ones_like(z))),
        HIDDEN,
        ("exp",),
    ),
    Cause(
        "a masked row, then nan_to_num",
        lambda y, d: y + _masked_by_addition(y, d).softmax(-1).nan_to_num(),
        HIDDEN,
        ("_softmax",),
    ),
    Cause(
        "a masked row that is left out",
        lambda y, d: y + _masked_by_addition(y, d).softmax(-1)[:2].sum(),
        HIDDEN,
        ("_softmax",),
    ),
    # -- made in the backward pass
    Cause("sqrt at 0", _forward(torch.sqrt), BACKWARD, ("div", "mul")),
    Cause("a norm at 0", lambda y, d: y + (y * d).square().sum(1, keepdim=True).sqrt(), BACKWARD, ("div", "mul")),
    Cause("0 to the power of 0.5", _forward(lambda z: z**0.5), BACKWARD, ("pow", "mul")),
    Cause("acos at 1", _forward(lambda z: torch.acos(1 - 0.5 * z)), BACKWARD, ("rsqrt", "mul", "div")),
    Cause("asin at 1", _forward(lambda z: torch.asin(1 - 0.5 * z)), BACKWARD, ("rsqrt", "mul", "div")),
    Cause("an autograd.Function", lambda y, d: _Reciprocal.apply(y, d), BACKWARD, ("div",)),
    Cause(
        "a NaN that an autograd.Function writes",
        lambda y, d: _Constant.apply(y, d),
        BACKWARD,
        ("fill_", "copy_"),
        compiles=False,
    ),
    Cause("equal singular values", _singular_vectors, BACKWARD, ("div", "mul", "sub"), FULL, compiles=False),
    Cause("equal eigenvalues", _eigenvectors, BACKWARD, ("div_", "mul", "sub"), FULL, compiles=False),
]


# -- what is wrong elsewhere -------------------------------------------------------------------------------------------

Batch = dict[str, torch.Tensor]
Loss = Callable[[torch.Tensor, Batch, nn.Module], torch.Tensor]
Damage = Callable[[Any, Any], None]


@dataclass(frozen=True)
class Special:
    """A cause in a batch, in a loss of another form, or in what is trained.

    Attributes:
        name: Name in tests and tables.
        expected: What must be said of it, and where it can be.
        spoil: Changes the batch of a bad step.
        loss: Makes the loss of the model's output, batch and model. Default: the mean of the squares of what is left.
        damage: Changes the model or the optimizer before the first bad step.
        optimizer: Makes the optimizer of parameters. Default: SGD.
        micro_batches: Number of micro-batches of a step, of which the last is bad.
    """

    name: str
    expected: Expected
    spoil: Callable[[Batch], None] = lambda batch: None
    loss: Loss | None = None
    damage: Damage = lambda model, optimizer: None
    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda parameters: torch.optim.SGD(parameters, 0.01)
    micro_batches: int = 1

    def __str__(self) -> str:
        return self.name


def _is_bad(batch: Batch) -> bool:
    return bool(batch["dial"].min() == 0)


def _dial(batch: Batch) -> None:
    batch["dial"][SAMPLE] = 0


def _write(name: str, value: float) -> Callable[[Batch], None]:
    def spoil(batch: Batch) -> None:
        batch[name][SAMPLE, 1] = value

    return spoil


def _into(name: str, value: float) -> Damage:
    """Writes into a tensor of the model."""

    def damage(model: nn.Module, optimizer: Any) -> None:
        tensor = {**dict(model.named_parameters()), **dict(model.named_buffers())}[name]
        with torch.no_grad():
            tensor.view(-1)[0] = value

    return damage


def _large(model: Any, optimizer: Any) -> None:
    with torch.no_grad():
        model.last.weight[0] = 0.9 * torch.finfo(model.last.weight.dtype).max


def _learning_rate(model: nn.Module, optimizer: Any) -> None:
    optimizer.param_groups[0]["lr"] = float("nan")


def _eps(model: nn.Module, optimizer: Any) -> None:
    optimizer.param_groups[0]["eps"] = 1e-8


def _but_one_class(prediction: torch.Tensor, batch: Batch, model: nn.Module) -> torch.Tensor:
    return prediction[:, 1:].float().square().mean()


def _divided(prediction: torch.Tensor, batch: Batch, model: nn.Module) -> torch.Tensor:
    return (prediction / batch["dial"]).float().square().mean()


def _ignored(prediction: torch.Tensor, batch: Batch, model: nn.Module) -> torch.Tensor:
    labels = torch.full((len(prediction),), -100 if _is_bad(batch) else 1)
    return functional.cross_entropy(prediction.float(), labels)


def _ctc(prediction: torch.Tensor, batch: Batch, model: nn.Module) -> torch.Tensor:
    log_probs = prediction.float().log_softmax(-1)[:, None, :]
    length = 9 if _is_bad(batch) else 2
    targets = torch.ones(1, length, dtype=torch.long)
    return functional.ctc_loss(log_probs, targets, torch.tensor([len(prediction)]), torch.tensor([length]))


def _penalty(prediction: torch.Tensor, batch: Batch, model: nn.Module) -> torch.Tensor:
    weights = (prediction - prediction.detach()) if _is_bad(batch) else prediction
    return prediction.float().square().mean() + weights.square().sum().sqrt()


def _gradient_penalty(prediction: torch.Tensor, batch: Batch, model: nn.Module) -> torch.Tensor:
    energy = (prediction * batch["dial"]).square().sum()
    (gradient,) = torch.autograd.grad(energy, prediction, create_graph=True)
    return prediction.float().square().mean() + gradient.square().sum(1).sqrt().sum()


LOCAL = ("plain", "wrap_step", "Accelerate", "Trainer", "Lightning")
WHOLE = (*LOCAL, "DDP")  # where a tensor of the model is written into as a whole
ALL = tuple(WORLDS)
IN_THE_LOSS = ("loss",)


def _expected(verdict: str, *operations: str, **where: Any) -> Expected:
    usual = {"dtypes": DTYPES, "places": IN_THE_LOSS, "ways": ALL, "executions": EXECUTIONS[:2]}
    file = "table.py" if operations else ""
    return Expected(verdicts=dict.fromkeys(PLACES, verdict), operations=operations, file=file, **{**usual, **where})


SPECIALS = [
    Special(
        "a NaN in a parameter",
        _expected("weights_nonfinite", ways=WHOLE, name="last.weight", stays=True),
        damage=_into("last.weight", float("nan")),
    ),
    Special(
        "a NaN in a buffer",
        _expected("weights_nonfinite", ways=WHOLE, name="offset", stays=True),
        damage=_into("offset", float("nan")),
    ),
    Special(
        "a weight that is too large",
        _expected("forward_nonfinite", ways=("plain", "wrap_step", "DDP"), name="last.weight", stays=True),
        damage=_large,
    ),
    *(
        Special(f"{shown} in an input", _expected("input_nonfinite", name="x"), spoil=_write("x", float(shown.lower())))
        for shown in ("NaN", "Inf", "-Inf")
    ),
    Special("a NaN in a label", _expected("input_nonfinite"), spoil=_write("label", float("nan"))),
    Special(  # its gradients are finite; among several ranks each tells of its own loss, and runs nothing again
        "no label at all",
        _expected("loss_nonfinite", "nll_loss_forward", "div", ways=LOCAL),
        spoil=_dial,
        loss=_ignored,
    ),
    Special("a CTC target that is too long", _expected("loss_nonfinite", "_ctc_loss"), spoil=_dial, loss=_ctc),
    Special("a penalty at 0", _expected("backward_nonfinite", "div", "mul"), spoil=_dial, loss=_penalty),
    Special(
        "a gradient penalty at 0",
        _expected("backward_nonfinite", "div", "mul", ways=(*WHOLE, "FSDP2")),  # DeepSpeed takes it for a backward pass
        spoil=_dial,
        loss=_gradient_penalty,
    ),
    Special(
        "a learning rate of NaN",
        _expected("update_nonfinite", ways=("plain", "DDP"), stays=True),
        damage=_learning_rate,
    ),
    Special(
        "an eps that float16 rounds to 0",
        _expected("update_nonfinite", ways=("plain", "DDP"), dtypes=("fp16",), executions=EXECUTIONS[:1], stays=True),
        loss=_but_one_class,
        damage=_eps,
        optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-3, eps=1e-4),
    ),
    Special(
        "one micro-batch of several",
        _expected("loss_nonfinite", "div", ways=("plain", "wrap_step")),
        spoil=_dial,
        loss=_divided,
        micro_batches=2,
    ),
]

BY_NAME: dict[str, Cause | Special] = {cause.name: cause for cause in (*CAUSES, *SPECIALS)}


def _of_cause(cause: Cause) -> Expected:
    """A cause can be anywhere."""
    in_model, in_loss = {
        REACHES: ("forward_nonfinite", "loss_nonfinite"),
        HIDDEN: ("forward_nonfinite", "loss_nonfinite"),
        BACKWARD: ("backward_nonfinite", "backward_nonfinite"),
    }[cause.effect]
    return Expected(
        dtypes=cause.dtypes,
        places=PLACES,
        ways=ALL,
        executions=EXECUTIONS if cause.compiles else [how for how in EXECUTIONS if how != "compiled"],
        verdicts={"model": in_model, "loss": in_loss},
        operations=cause.operations,
        file="table.py",
        is_loss_finite=cause.effect != REACHES,
    )


EXPECTED: dict[str, Expected] = {
    **{cause.name: _of_cause(cause) for cause in CAUSES},
    **{special.name: special.expected for special in SPECIALS},
}
