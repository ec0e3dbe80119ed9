"""The faults of the campaign, in a run of any framework: what is planted, and what must have been seen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import hallo_numguard as ng

from campaign.cases import CLEAN_STEPS, FAULTY_STEP, STEPS, Case, Seen, problems
from campaign.models import MODELS, Transformer

FAULTS = (
    "none",
    "weight",
    "frozen_weight",
    "buffer",
    "optimizer_state",
    "input",
    "forward",
    "backward",
    "gradient",
)
INPUT = {"transformer": ("features", (2, 3, 1)), "unet": ("noisy", (2, 1, 6, 4))}
BUFFER = {"transformer": (0, 1), "unet": (1,)}
STATE = (3, 5)
GRADIENT = (7, 2)


class WithLoss(Transformer):
    """As the Hugging Face Trainer wants it: called with the target as well, returns the loss, and can be saved."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 16, bias=False)  # tied weights of plain modules the Trainer does not save

    def forward(self, tokens, features, target):
        return {"loss": self.loss(super().forward(tokens, features), target)}


@dataclass
class Faulty:
    """A model with a fault planted.

    Attributes:
        case: Of the campaign: at stage 0, in float32.
        reports: What `on_overflow` was given; pass `reports.append`.
    """

    fault: str
    name: str = "transformer"
    kind: type[nn.Module] | None = None
    reports: list[ng.OverflowReport] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.case = Case(self.fault, self.name, "fp32", 0, False, 1)
        torch.manual_seed(0)
        self.model = (self.kind or MODELS[self.name])()
        if self.fault == "buffer":
            dict(self.model.named_buffers())[self.model.buffer].view(-1)[1] = float("nan")
        if self.fault == "backward":
            self.model.register_forward_pre_hook(self._arm, with_kwargs=True)

    @property
    def steps(self) -> int:
        """How many the campaign makes."""
        return CLEAN_STEPS if self.fault == "none" else STEPS

    @property
    def config(self) -> ng.GuardConfig:
        """What the campaign uses."""
        return ng.GuardConfig(local_gradients="always" if self.fault == "gradient" else "on_alarm")

    def batch(self, step: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Arguments and target of a step, from 1."""
        return self.model.batch(torch.Generator().manual_seed(step), torch.float32)

    def plant(self, optimizer: Any, prefix: str = "") -> None:
        """Plants what is planted by hooks; `prefix` stands before the names of the model that is trained."""
        self.prefix = prefix
        target = _Target(self.model, optimizer)
        model = self.model
        shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
        self.planted: tuple[str, tuple[int, ...]] = ("", ())

        def inject(kind: str, name: str | None, **options: Any) -> None:
            ng.inject(target, kind, name, step=FAULTY_STEP, **options)

        if self.fault in ("weight", "frozen_weight"):
            name = model.trainable if self.fault == "weight" else model.frozen
            index = tuple(size - 1 for size in shapes[name])
            inject("parameter", name, index=index)
            self.planted = (name, index)
        elif self.fault == "optimizer_state":
            inject("optimizer_state", model.trainable, index=STATE)
            self.planted = (model.trainable, STATE)
        elif self.fault == "input":
            self.planted = INPUT[self.name]
            inject("input", None, index=self.planted[1])
        elif self.fault == "gradient":
            inject("gradient", model.trainable, index=GRADIENT)
            self.planted = (model.trainable, GRADIENT)
        elif self.fault == "forward":
            inject("activation", model.module, value=float("inf"))
            self.planted = (model.module, ())
        elif self.fault == "buffer":
            self.planted = (model.buffer, BUFFER[self.name])
        elif self.fault == "backward":
            self.planted = ("trap", ())

    def problems(self, guard: Any, raised: bool) -> list[str]:
        """Returns what the campaign would find wrong with what the guard has seen."""
        report = self.reports[0] if self.reports else None
        first = report and report.first
        seen = Seen(
            verdict=report and report.verdict.value,
            provisional=report is not None and report.provisional,
            recoverable=report.recoverable if report else None,
            first=first and (first.kind, self._plain(first.name), first.index, first.rank),
            applied=tuple(record.applied for record in guard.history),
            raised=raised,
            findings=tuple((finding.kind, self._plain(finding.name)) for finding in guard.findings),
            last=(guard.last_report.verdict.value, guard.last_report.provisional)
            if guard.last_report
            else (None, False),
            finite=all(bool(torch.isfinite(tensor).all()) for tensor in self.model.parameters()),
            planted=self.planted,
            named_scale=None,
            settled_at=1.0,
        )
        return problems(self.case, [seen])

    def _plain(self, name: str) -> str:
        return name.removeprefix(self.prefix)

    def _arm(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Arms the trap for the batch of one step, whoever runs it how often."""
        first = args[0] if args else kwargs["tokens"]
        model.trap.armed = torch.equal(first, self.batch(FAULTY_STEP)[0][0])


@dataclass
class _Target:
    module: nn.Module
    optimizer: Any


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns a copy of all that training changes."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Fails unless they are equal, bit for bit."""
    assert left.keys() == right.keys()
    different = [name for name, tensor in left.items() if not torch.equal(tensor, right[name])]
    assert different == []
