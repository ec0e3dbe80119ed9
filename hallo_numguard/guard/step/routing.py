"""Routers of a mixture of experts: tokens that no expert takes, and routers that are sure of every choice.

A look costs some small operations a router, in the steps that are sampled; in all others a hook returns at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from hallo_numguard.guard.containment import Probes
from hallo_numguard.guard.guarded_model import Routed, Router
from hallo_numguard.ops.device import AsyncHostCopy

MIN_SHARE = 0.5  # of the tokens
MIN_SAMPLES = 3  # in a row
FIRST_STEP = 8  # of a sample that counts: routers begin far from balance
SURE_GAP = 17.0  # between two logits: exp(-17) is lost beside 1 in float32

Warn = Callable[[str, int, str, str], None]
"""Called with the kind of finding, the step, the message, and the name of the router."""


class Figures(NamedTuple):
    """What is kept of a router's last call in a step.

    Attributes:
        chosen: Number of choices of an expert: tokens times experts a token.
        dropped: Number of these that found the expert full.
        tokens: Number of tokens.
        sure: Number of tokens for which softmax gives the best expert 1, to the last bit.
        largest: Largest absolute value of the logits.
    """

    chosen: float
    dropped: float
    tokens: float
    sure: float
    largest: float


class Routing:
    """Watches the routers, and warns of what stays wrong in sample after sample.

    Args:
        routers: The routers of the model.
        probes: Containment of failures in the user's forward pass.
        warn: Takes the warnings.
    """

    def __init__(self, routers: Sequence[Router], probes: Probes, warn: Warn) -> None:
        self._routers = routers
        self._probes = probes
        self._warn = warn
        self._listens = False
        self._heard: dict[str, torch.Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._in_a_row: dict[tuple[str, str], int] = {}  # by kind of finding and router

    def start(self) -> None:
        """Puts the hooks on."""
        self._handles = [
            router.module.register_forward_hook(partial(self._on_call, router)) for router in self._routers
        ]

    def stop(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._heard.clear()

    def listen(self) -> None:
        """Looks at the calls from now on, until `heard`."""
        self._listens = bool(self._handles)

    def heard(self) -> tuple[Sequence[str], AsyncHostCopy] | None:
        """Returns the names of the routers that were called, and their `Figures`, a row each. No host sync."""
        self._listens, heard = False, self._heard
        self._heard = {}
        if not heard:
            return None
        rows = list(heard.values())
        return list(heard), AsyncHostCopy(torch.stack([row.to(rows[0].device) for row in rows]))

    def _on_call(self, router: Router, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not self._listens:
            return
        if module.training and torch.is_grad_enabled():
            self._probes.run("look at the routers", self._look, router, args, output)

    @torch.no_grad()
    def _look(self, router: Router, args: Any, output: Any) -> None:
        self._heard[router.name] = _figures(router.read(args, output))

    def check(self, step: int, names: Sequence[str], rows: Sequence[Sequence[float]]) -> None:
        """Takes a sample.

        Args:
            step: Number of the step.
            names: Names of the routers.
            rows: Their `Figures`.
        """
        for name, row in zip(names, rows, strict=True):
            figures = Figures(*row)
            self._tell(
                "tokens_dropped",
                step,
                name,
                figures.dropped / max(figures.chosen, 1),
                f"{figures.dropped:.0f} of {figures.chosen:.0f} choices of an expert found it full, and half or more "
                f"did in the {MIN_SAMPLES - 1} samples before: few experts get most of the tokens. Add the balance "
                "loss (l_aux) to the loss, or raise capacity_factor",
            )
            self._tell(
                "router_saturated",
                step,
                name,
                figures.sure / max(figures.tokens, 1),
                f"for {figures.sure:.0f} of {figures.tokens:.0f} tokens the logit of the best expert is more than "
                f"{SURE_GAP:.0f} above the next, so that softmax gives it 1 to the last bit, and for half or more in "
                f"the {MIN_SAMPLES - 1} samples before; logits reach {figures.largest:.4g}. Next to no gradient "
                "reaches their choice: lower the learning rate, or penalise large logits (router z-loss)",
            )

    def _tell(self, kind: str, step: int, name: str, share: float, message: str) -> None:
        """Warns of what has concerned half or more in enough samples in a row."""
        is_seen = step >= FIRST_STEP and share >= MIN_SHARE
        self._in_a_row[kind, name] = self._in_a_row.get((kind, name), 0) + 1 if is_seen else 0
        if self._in_a_row[kind, name] >= MIN_SAMPLES:
            self._warn(kind, step, f"router {name}: {message}", name)


def _figures(routed: Routed) -> torch.Tensor:
    """`Figures` as float64 on the device of the logits."""
    logits = routed.logits
    best = logits.topk(min(2, logits.shape[1]), dim=1).values
    gaps = best[:, 0] - best[:, -1]
    chosen = routed.chosen.to(logits.device).double()
    figures = (
        chosen.sum(),
        (chosen - routed.capacity).clamp(min=0).sum(),
        torch.full_like(chosen[0], len(logits)),
        (gaps > SURE_GAP).sum(),
        logits.abs().amax(),
    )
    return torch.stack([figure.double() for figure in figures])
