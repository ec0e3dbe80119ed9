"""The run's checkpoints as the policy uses them: which steps vouch for them, and the way back to one."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from hallo_numguard.core.config import GuardConfig
from hallo_numguard.core.errors import CheckpointFailed, NumericsError
from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.core.records import StepRecord
from hallo_numguard.guard.collectives import Ranks
from hallo_numguard.guard.guarded_model import GuardedModel

_log = logging.getLogger("hallo_numguard")


class KeptCheckpoints:
    """Tells the checkpoint keeper which steps were clean, and goes back to a checkpoint where that was agreed.

    Args:
        config: Settings; without a keeper nothing is kept.
        model: The guarded model.
        ranks: Ranks that take part.

    Attributes:
        step_is_unclean: Whether something of this step was not finite, and not because of the loss scale.
        to_undo: Report on the step that is to be undone, if all ranks have agreed to go back and have not yet.
    """

    def __init__(self, config: GuardConfig, model: GuardedModel, ranks: Ranks) -> None:
        self.step_is_unclean = False
        self.to_undo: OverflowReport | None = None
        self._keeper = config.keeper
        self._max_rollbacks = config.policy.max_rollbacks
        self._model = model
        self._ranks = ranks
        self._rollbacks = 0

    @property
    def can_go_back(self) -> bool:
        """Whether this rank can go back to a checkpoint, and the policy allows it once more."""
        can_go_back = self._keeper is not None and self._model.can_go_back()
        return can_go_back and self._rollbacks < self._max_rollbacks

    def go_back(self, run: Any) -> bool:
        """Rolls a run back to its last healthy checkpoint, if that was agreed. All ranks call it after every step.

        Returns:
            Whether it went back.

        Raises:
            NumericsError: On all ranks, if there is no such checkpoint, or it cannot be loaded.
        """
        report, self.to_undo = self.to_undo, None
        if report is None:
            return False
        self._rollbacks += 1
        try:
            checkpoint = self._keeper.rollback(run)
        except CheckpointFailed as error:
            if self._ranks.speaks:
                _log.error("step %d cannot be undone: %s", report.step, error)
            raise NumericsError(report) from error
        if self._ranks.speaks:
            message = "went back to checkpoint %s: rollback %d of %d"
            _log.warning(message, checkpoint, self._rollbacks, self._max_rollbacks)
        return True

    def step_is_over(self, applied: bool, records: Sequence[StepRecord]) -> None:
        """Tells the keeper how the step went.

        Args:
            applied: Whether it was applied.
            records: Figures that have become known; the last are those of the last step that is known.
        """
        if self._keeper is None:
            return
        last = records[-1] if records else None
        loss = None if last is None else last.loss
        if self.step_is_unclean or (loss is not None and not math.isfinite(loss)):
            self._keeper.bad_step()
        elif applied:
            self._keeper.clean_step(last)
