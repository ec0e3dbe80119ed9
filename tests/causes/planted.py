"""What is trained: a small model with a cause in it, or in the loss, and batches, some with a special sample."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import hallo_numguard as ng

from causes.cases import BAD_STEPS, CHECKPOINTED, COMPILED, INDUCTOR, REENTRANT, SAMPLE, Case
from causes.table import BY_NAME, Cause, Function, Special

BATCH, FEATURES, WIDTH, CLASSES = 6, 8, 16, 4
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BACKENDS = {COMPILED: "aot_eager", INDUCTOR: "inductor"}

Batch = dict[str, torch.Tensor]


class Place(nn.Module):
    """Where a cause is planted."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, y: torch.Tensor, dial: torch.Tensor) -> torch.Tensor:
        return self.function(y, dial)


class Net(nn.Module):
    """A model with a place for a cause."""

    def __init__(self, function: Function, execution: str) -> None:
        super().__init__()
        self.execution = execution
        self.first = nn.Linear(FEATURES, WIDTH)
        self.place = Place(function)
        self.last = nn.Linear(WIDTH, CLASSES)
        self.register_buffer("offset", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor, dial: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x)) + self.offset
        if self.execution in (REENTRANT, CHECKPOINTED):
            hidden = checkpoint(self.place, hidden, dial, use_reentrant=self.execution == REENTRANT)
        else:
            hidden = self.place(hidden, dial)
        return self.last(hidden)


class Run:
    """One run of one rank: what a way needs, and what it leaves behind.

    Args:
        case: The case.
        rank: This process.

    Attributes:
        model: The model, in float32.
        reports: What the guard has reported.
        guards: Guards, to be detached in the end.
    """

    def __init__(self, case: Case, rank: int) -> None:
        self.case, self.rank = case, rank
        self.dtype = TORCH_DTYPES[case.dtype]
        self.cause: Cause | Special = BY_NAME[case.cause]
        torch.manual_seed(0)
        self.model = Net(self._function("model"), case.execution)
        self.reports: list[ng.OverflowReport] = []
        self.guards: list[Any] = []
        self.config = ng.GuardConfig(policy=ng.Policy(on_unrecoverable="warn", max_consecutive_skips=1000))

    def _function(self, place: str) -> Function:
        planted = isinstance(self.cause, Cause) and self.case.place == place
        return self.cause.function if planted else lambda y, dial: y

    @property
    def backend(self) -> str | None:
        """What compiles the model."""
        return BACKENDS.get(self.case.execution)

    def compile(self) -> None:
        """Compiles the model in place, if it is to be."""
        if self.backend is not None:
            self.model.compile(backend=self.backend)

    def micro_batches(self, step: int) -> list[Batch]:
        """Returns the batches of a step, from 1."""
        count = self.cause.micro_batches if isinstance(self.cause, Special) else 1
        return [self.batch(-step - 10 * number) for number in range(count - 1)] + [self.batch(step)]

    def batch(self, step: int) -> Batch:
        """Returns the batch of a step, from 1."""
        generator = torch.Generator().manual_seed(100 + step + 1000 * self.rank)
        batch = {
            "x": torch.randn(BATCH, FEATURES, generator=generator).to(self.dtype),
            "dial": torch.ones(BATCH, 1, dtype=self.dtype),
            "label": torch.randn(BATCH, CLASSES, generator=generator).to(self.dtype),
        }
        if step in BAD_STEPS and self.rank == self.case.culprit:
            if isinstance(self.cause, Cause):
                batch["dial"][SAMPLE] = 0
            else:
                self.cause.spoil(batch)
        return batch

    def loss(self, model: Callable[..., torch.Tensor], batch: Batch) -> torch.Tensor:
        """Returns the loss of a batch."""
        prediction = model(batch["x"], batch["dial"])
        prediction = self._function("loss")(prediction, batch["dial"])
        if isinstance(self.cause, Special) and self.cause.loss is not None:
            return self.cause.loss(prediction, batch, self.model)
        return (prediction - batch["label"]).float().square().mean()

    def before(self, step: int, optimizer: Any) -> None:
        """What happens before a step."""
        if step == BAD_STEPS[0] and isinstance(self.cause, Special):
            self.cause.damage(self.model, optimizer)

    def end(self) -> None:
        """Removes the guards."""
        for guard in self.guards:
            guard.detach()

    def cast(self) -> contextlib.AbstractContextManager[Any]:
        """Returns autocast to the precision."""
        if self.case.dtype == "fp32":
            return contextlib.nullcontext()
        return torch.autocast("cpu", dtype=self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Returns a scaler, which does nothing but in float16."""
        return torch.amp.GradScaler("cpu", init_scale=2.0**4, enabled=self.case.dtype == "fp16")

    def optimizer(self) -> torch.optim.Optimizer:
        """Returns an optimizer of the model."""
        if isinstance(self.cause, Special):
            return self.cause.optimizer(self.model.parameters())
        return torch.optim.SGD(self.model.parameters(), 0.01)
