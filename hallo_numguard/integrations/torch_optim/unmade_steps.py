"""Steps that a script decides on by itself: it looks at the norm of the gradients, and may leave its step out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hallo_numguard.guard.containment import Probes
from hallo_numguard.integrations.torch_optim import clip_calls
from hallo_numguard.integrations.torch_optim.parameter_gradients import GradientScan


@dataclass
class EarlyScan:
    """A scan of the gradients before they were clipped.

    Attributes:
        gradients: The gradients.
        scan: Their statistics.
        asked: Gradients of which torch has computed the norm.
        norm: That norm.
        versions: Versions of the gradients, after the last change that clipping has made to them.
    """

    gradients: list[torch.Tensor]
    scan: GradientScan
    versions: list[int]
    asked: Sequence[torch.Tensor]
    norm: torch.Tensor | None = None

    def is_of(self, gradients: Sequence[torch.Tensor]) -> bool:
        """Whether these are the gradients, with no change since but by clipping."""
        return list(map(id, gradients)) == list(map(id, self.gradients)) and self.versions == _versions(gradients)

    def is_all_of(self, gradients: Sequence[torch.Tensor]) -> bool:
        """Whether no other gradients are among these."""
        ids = set(map(id, self.gradients))
        return all(id(gradient) in ids for gradient in gradients)


class UnmadeSteps:
    """Reads the gradients before torch clips them, and notices when no step follows though their norm is not finite.

    Args:
        collect: Returns the gradients of the guarded optimizer, as its guard scans them.
        scan: Reads them; None if that has failed.
        may_look: Whether the gradients are not checked already.
        on_unmade: Called with the scan of a step that the script has left out, as the norm was not finite.
        on_uncleared: Called when a backward pass adds to gradients that were not finite and were never cleared.
        raise_late: Raises what the policy has decided on where it could not be raised.
        probes: Contains failures.
    """

    def __init__(
        self,
        collect: Callable[[], list[torch.Tensor]],
        scan: Callable[[list[torch.Tensor]], GradientScan | None],
        may_look: Callable[[], bool],
        on_unmade: Callable[[GradientScan], None],
        on_uncleared: Callable[[], None],
        raise_late: Callable[[], None],
        probes: Probes,
    ) -> None:
        self._collect = collect
        self._scan = scan
        self._may_look = may_look
        self._on_unmade = on_unmade
        self._on_uncleared = on_uncleared
        self._raise_late = raise_late
        self._probes = probes
        self._early: EarlyScan | None = None
        self._is_ours = False  # the call of clipping under way
        self._is_changed = False  # whether gradients were changed by something else before this clipping
        self._bad: list[tuple[torch.Tensor, int]] | None = None  # gradients of the last bad step, and their versions
        self._is_uncleared = False
        clip_calls.observe(self)

    def stop(self) -> None:
        """Sees no more calls."""
        clip_calls.ignore(self)
        self._early = self._bad = None

    def scan_of(self, gradients: list[torch.Tensor]) -> GradientScan | None:
        """Returns the scan that was made before clipping, if these are its gradients. The step is being made."""
        early, self._early = self._early, None
        return early.scan if early is not None and early.is_of(gradients) else None

    # -- clipping ------------------------------------------------------------------------------------------------------

    def before_norm(self, gradients: Sequence[torch.Tensor]) -> None:
        """See `ClipObserver`."""
        self._is_ours = False
        if gradients and self._may_look() and not self._is_explained(gradients[0]):
            self._probes.run("look before clipping", self._look, gradients)
        if self._is_ours:
            self._raise_late()

    def _is_explained(self, gradient: torch.Tensor) -> bool:
        """Whether it belongs to a bad step that is over, and has not changed since: Lightning clips after it."""
        return any(one is gradient and gradient._version == version for one, version in self._bad or ())

    def _look(self, gradients: Sequence[torch.Tensor]) -> None:
        mine = self._collect()
        self._is_ours = bool(mine) and (gradients[0] is mine[0] or _have_common(gradients, mine))
        if not self._is_ours or (self._early is not None and self._early.is_of(mine)):
            return
        scan = self._scan(mine)
        self._early = None if scan is None else EarlyScan(mine, scan, _versions(mine), gradients)

    def after_norm(self, norm: torch.Tensor) -> None:
        """See `ClipObserver`."""
        if self._is_ours and self._early is not None and isinstance(norm, torch.Tensor):
            self._early.norm = norm.detach()

    def before_scaling(self) -> None:
        """See `ClipObserver`."""
        early = self._early
        self._is_changed = early is not None and early.versions != _versions(early.gradients)

    def after_scaling(self) -> None:
        """See `ClipObserver`."""
        if self._early is not None and not self._is_changed:
            self._early.versions = _versions(self._early.gradients)

    # -- what follows --------------------------------------------------------------------------------------------------

    def no_step_was_made(self) -> None:
        """The gradients are about to be cleared, or added to: tells of a step that was left out."""
        self._probes.run("look before clipping", self._no_step_was_made)

    def _no_step_was_made(self) -> None:
        early, self._early = self._early, None
        if early is None or early.norm is None or math.isfinite(float(early.norm)):
            return
        is_bad = bool(early.scan.pieces.table.any_nonfinite())
        if not is_bad and not early.is_all_of(early.asked):
            return  # another optimizer's gradients have made the norm so
        self._on_unmade(early.scan)
        if is_bad:
            self.step_was_bad(early.gradients)

    def step_was_bad(self, gradients: Sequence[torch.Tensor]) -> None:
        """Remembers gradients that are not finite, to notice if nobody clears them."""
        self._bad = [(gradient, gradient._version) for gradient in gradients]

    def gradients_were_cleared(self) -> None:
        """The script clears the gradients."""
        self._bad, self._is_uncleared = None, False

    def before_backward(self) -> None:
        """A backward pass begins, and adds to the gradients that are there."""
        self._probes.run("look before clipping", self._before_backward)

    def _before_backward(self) -> None:
        self._no_step_was_made()
        bad, self._bad = self._bad, None
        if bad is None:
            return
        now = {id(gradient): gradient._version for gradient in self._collect()}
        self._is_uncleared = bool(bad) and all(now.get(id(gradient)) == version for gradient, version in bad)
        if self._is_uncleared:
            self._on_uncleared()

    @property
    def is_uncleared(self) -> bool:
        """Whether the gradients of this step were added to some that were not finite."""
        return self._is_uncleared


def _have_common(gradients: Sequence[torch.Tensor], mine: Sequence[torch.Tensor]) -> bool:
    ids = set(map(id, mine))
    return any(id(gradient) in ids for gradient in gradients)


def _versions(gradients: Sequence[torch.Tensor]) -> list[int]:
    return [gradient._version for gradient in gradients]
