"""The faults of the campaign, in a run of any framework: what is planted, and what must have been seen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import hallo_numguard as ng

from campaign.cases import CLEAN_STEPS, FAULTY_STEP, STEPS, Case, problems
from campaign.faults import build, config_of, observed, plant
from campaign.models import Transformer

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


class Untied(Transformer):
    """Without tied weights: those of plain modules the Trainer does not save, and FSDP2 does not shard."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 16, bias=False)


class WithLoss(Untied):
    """As the Hugging Face Trainer wants it: called with the target as well, returns the loss."""

    def forward(self, tokens, features, target):
        return {"loss": self.loss(super().forward(tokens, features), target)}


@dataclass
class Faulty:
    """A model with a fault planted.

    Attributes:
        fault: Fault of the campaign.
        name: Model of the campaign.
        kind: Class of the model. Default: the campaign's.
        ranks: Number of processes; the fault is planted on the last.
        fused: Whether the optimizer is fused.
        reports: What `on_overflow` was given; pass `reports.append`.
    """

    fault: str
    name: str = "transformer"
    kind: type[nn.Module] | None = None
    ranks: int = 1
    fused: bool = False
    reports: list[ng.OverflowReport] = field(default_factory=list)
    planted: tuple[str, tuple[int, ...]] = ("", ())
    prefix: str = ""

    def __post_init__(self) -> None:
        self.case = Case(self.fault, self.name, "fp32", 0, False, self.ranks)
        self.model = build(self.case, self.kind)
        if self.fault == "backward":
            self.model.register_forward_pre_hook(self._arm, with_kwargs=True)

    @property
    def steps(self) -> int:
        """Number of steps of the campaign."""
        return CLEAN_STEPS if self.fault == "none" else STEPS

    @property
    def rank(self) -> int:
        """This process."""
        return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0

    @property
    def config(self) -> ng.GuardConfig:
        """The campaign's configuration."""
        return config_of(self.case)

    def optimizer(self) -> torch.optim.Optimizer:
        """Returns a new one, for what is trained."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-3, fused=self.fused or None)

    def batch(self, step: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Arguments and target of a step, from 1."""
        generator = torch.Generator().manual_seed(step + 100 * self.rank)
        return self.model.batch(generator, next(self.model.parameters()).dtype)

    def plant(self, optimizer: Any, prefix: str = "") -> None:
        """Plants what is planted by hooks; `prefix` stands before the names of the model that is trained."""
        self.prefix = prefix
        self.planted = plant(self.case, _Target(self.model, optimizer), self.model)

    def problems(self, guard: Any, raised: bool) -> list[str]:
        """Returns what the campaign would find wrong with what the guard has seen."""
        finite = all(bool(local(tensor).isfinite().all()) for tensor in self.model.parameters())
        return problems(self.case, [observed(guard, self.reports, raised, self.planted, finite, self.prefix)])

    def _arm(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Arms the trap for the batch of one step, whoever runs it how often."""
        first = args[0] if args else kwargs["tokens"]
        model.trap.armed = torch.equal(first, self.batch(FAULTY_STEP)[0][0])


@dataclass
class _Target:
    module: nn.Module
    optimizer: Any


def local(tensor: Any) -> torch.Tensor:
    """Returns what this rank holds of a tensor that may be sharded."""
    return getattr(tensor, "_local_tensor", tensor).detach()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns a copy of all that training changes, of this rank's slices."""
    return {name: local(tensor).clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Fails unless they are equal, bit for bit."""
    assert left.keys() == right.keys()
    different = [name for name, tensor in left.items() if not torch.equal(tensor, right[name])]
    assert different == []
