"""Stage 0 in float32: DeepSpeed steps torch's own optimizer, and checks nothing.

| DeepSpeed's pass that is not made | how it gets the guard's result |
|---|---|
| the norm in `engine.clip_fp32_gradients` | `clip` makes the same steps with the table's norm |
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from hallo_numguard.guard.collectives import Ranks
from hallo_numguard.guard.guarded_model import ScannedPieces
from hallo_numguard.guard.loss_scaling import UNSCALED, LossScaling
from hallo_numguard.integrations.deepspeed.adapters.gradient_storage import GradientSource, ParameterGradients
from hallo_numguard.integrations.deepspeed.adapters.optimizer_adapter import OptimizerAdapter, Part
from hallo_numguard.integrations.deepspeed.adapters.replaced_norms import norm_of
from hallo_numguard.integrations.deepspeed.autocast import scaling_of_scaler
from hallo_numguard.integrations.patches import MethodPatches


class PlainAdapter(OptimizerAdapter):
    """Any `torch.optim.Optimizer`: every rank holds all of the gradients and of the state."""

    class_names = ("Optimizer",)
    groups_attribute = "param_groups"
    required_attributes = ("param_groups",)
    state_is_sliced = False
    has_masters = False

    @classmethod
    def parameter_groups(cls, optimizer: Any) -> Iterable[Sequence[torch.Tensor]]:
        """Returns the parameters that `optimizer` trains, by group."""
        return [group["params"] for group in optimizer.param_groups]

    def gradient_source(self) -> GradientSource:
        """Returns the whole `parameter.grad` of each parameter."""
        return ParameterGradients(lambda: self.parameter_groups(self.optimizer), self.positions)

    def loss_scaling(self) -> LossScaling:
        """Returns the state of the GradScaler; without one, that nothing is scaled."""
        return UNSCALED if self.scaler is None else scaling_of_scaler(self.scaler)

    def state_parts(self) -> Iterator[Part]:
        """Yields the moments of each parameter."""
        for parameter in itertools.chain.from_iterable(self.parameter_groups(self.optimizer)):
            yield from self.whole_parts(self.optimizer, parameter, self.positions.get(parameter), is_master=False)

    def replace_passes(self, patches: MethodPatches) -> None:
        """Replaces nothing here: the guard calls `clip` in place of the engine's clipping."""

    def checks_overflow(self) -> bool:
        """Returns False: only the guard checks."""
        return False


def clip(scan: ScannedPieces, gradients: Sequence[torch.Tensor], max_norm: float, ranks: Ranks) -> None:
    """Clips as DeepSpeed's `clip_grad_norm_` does without model parallelism, by the norm of the scan.

    All ranks hold the same gradients; the mean over them is DeepSpeed's, and makes them clip by the same bits.
    """
    norm = ranks.mean(norm_of(scan.table).float())
    torch._foreach_mul_(list(gradients), torch.clamp(max_norm / (norm + 1e-6), max=1.0))
