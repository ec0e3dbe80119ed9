"""Settings of a guard, and actions after an overflow."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hallo_numguard.core.errors import InvalidInput
from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.core.records import Verdict

ACTIONS = ("continue", "warn", "skip", "rollback", "raise")
"""Actions after an overflow, mildest first. The step itself is skipped in any case."""

SAVE_ACTIONS = ("warn", "raise")
"""Actions where non-finite values are about to be saved."""

CHECK_UPDATES = ("never", "part", "all")
MODES = ("replace", "observe")
LOCAL_GRADIENTS = ("never", "on_alarm", "always")

OverflowCallback = Callable[[OverflowReport], str | None]
Action = str | OverflowCallback


_MAX_NAME = 200  # characters


def check_action(action: object, where: str) -> str:
    """Returns `action` if it is the name of an action.

    Raises:
        InvalidInput: If it is no action.
    """
    if not isinstance(action, str) or action not in ACTIONS:
        raise InvalidInput(f"{where} must be one of {', '.join(ACTIONS)}, got {action!r}")
    return action


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Actions after an overflow.

    Attributes:
        on_unrecoverable: Action where `report.recoverable` is False: "raise" (default) stops at once instead of
            burning every halving of the loss scale; "rollback" puts the run back to the last healthy checkpoint of
            `GuardConfig.keeper` and goes on with the next batch; "warn" lets DeepSpeed go on.
        on_bad_save: Action where a framework is about to save weights or optimizer state that are not finite, or a
            buffer that has gone bad since the run was attached or loaded: "raise" (default) raises `NumericsError` in
            place of the save, so that no finite checkpoint is replaced; "warn" logs it and saves. What is as it was
            then, and blamed by no report, is saved.
        actions: Action by verdict, in place of the default: a name, or a callable that gets the report and returns a
            name or None. "continue" logs one line, "warn" and "skip" log the report (the step is skipped in any case),
            "rollback" goes back, "raise" raises `NumericsError` once the framework has dropped the step's gradients.
        max_consecutive_skips: Number of skipped steps in a row after which the guard raises, unless a lower loss scale
            is still to be tried or `actions` says otherwise. Frameworks that do not scale the loss skip in silence.
            Steps that are applied with a loss that is not finite count too, where there is one rank. A `rank_fault`
            that comes back on the same rank within 100 steps is unrecoverable.
        keep_scale: Whether the loss scale stays where lowering it cannot help: the loss was non-finite before scaling.
        max_rollbacks: Number of rollbacks of one guard. After these it raises, as it does without a healthy checkpoint.
        enforce: Whether a step with non-finite gradients is skipped also where the framework's own configuration
            switches the check off (DeepSpeed's `bf16.check_grad_overflow: false`); else it is reported only.
    """

    on_unrecoverable: str = "raise"
    on_bad_save: str = "raise"
    actions: Mapping[Verdict, Action] = field(default_factory=dict)
    max_consecutive_skips: int = 10
    keep_scale: bool = False
    max_rollbacks: int = 3
    enforce: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.max_consecutive_skips, int) or self.max_consecutive_skips < 1:
            raise InvalidInput(
                f"policy.max_consecutive_skips must be a positive number of steps, got {self.max_consecutive_skips!r}"
            )
        if not isinstance(self.max_rollbacks, int) or self.max_rollbacks < 0:
            raise InvalidInput(f"policy.max_rollbacks must be a number of rollbacks, got {self.max_rollbacks!r}")
        check_action(self.on_unrecoverable, "policy.on_unrecoverable")
        if self.on_bad_save not in SAVE_ACTIONS:
            raise InvalidInput(f"policy.on_bad_save must be one of {', '.join(SAVE_ACTIONS)}, got {self.on_bad_save!r}")
        for verdict, action in self.actions.items():
            if verdict not in set(Verdict):
                known = ", ".join(Verdict)
                raise InvalidInput(f"policy.actions: expected a verdict of {known}, got {verdict!r}")
            if not callable(action):
                check_action(action, f"policy.actions[{verdict}]")

    def action_for(self, report: OverflowReport, may_settle: bool = False, in_a_row: int = 0) -> str:
        """Returns the name of the action for `report`.

        Args:
            report: Report on the overflow.
            may_settle: Whether a lower loss scale is still to be tried, which may end the overflows.
            in_a_row: Number of reported steps in a row, this one included, that were applied and not skipped.
        """
        chosen = self.actions.get(report.verdict)
        if callable(chosen):
            chosen = chosen(report)
            if chosen is not None:
                chosen = check_action(chosen, f"what policy.actions[{report.verdict}] returned")
        if chosen is not None:
            return chosen
        if report.recoverable is False:
            return self.on_unrecoverable
        if report.recoverable and report.verdict is not Verdict.INPUT_NONFINITE:
            return "continue"
        bad_steps = max(report.consecutive_skips, in_a_row)
        is_too_often = bad_steps >= self.max_consecutive_skips and not may_settle
        return "raise" if is_too_often else "warn"


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Settings of a guard.

    Attributes:
        mode: "replace" (default): the guard's pass over the gradients stands in for the framework's own check and norm
            if these can be replaced; "observe": the framework makes its own passes as well.
        history: Number of steps that the flight recorder keeps.
        local_gradients: When gradients are scanned before the reduction as well, to find the rank that they come
            from: "never", "on_alarm" (default: from the step after an overflow on, until 20 steps were clean) or
            "always". Costs a small pass and a Python call per parameter in these steps.
        check_updates: Weights that are looked at right before and right after each update of the optimizer, to find
            what an update makes non-finite in the step in which it does: "part" (default: all of up to 4 MiB, and all
            in the first 4 steps, in 20 after an alarm, and while a setting of the optimizer is odd, such as a NaN
            learning rate; else a 32nd of them in turn, well below 1 % of a step), "all" (reads all weights twice a
            step, without a wait on a GPU) or "never".
        policy: Actions after an overflow.
        name: Name of the run, for its reports.
        dump_dir: Folder for all reports, with the flight recorder's steps of each parameter, as
            `overflow-step<number>-rank<number>-<run>.json`: from rank 0, and from the rank of the first offender. The
            run is the time at which it was guarded and a random number, the same on all ranks, so that no run replaces
            what another has written. None for no reports.
        repro_dir: Folder for bundles that reproduce an overflow in one process, without the framework: the batch, the
            random state, the configuration, the report, the one bad call of the named module with its weights, and a
            script. Overflows of scale or reduction get none. Costs a pass over the batch for each bundle; at most 8
            bundles per run. None for no bundles.
        dump_keep: Numbers of reports in `dump_dir` and of bundles in `repro_dir` that are kept: the first of each
            verdict, and the last of all. Others that this run has written are deleted, on each rank its own.
        sinks: Trackers that get the figures of every step and the reports, from rank 0, each one of: a SummaryWriter of
            the run (torch.utils.tensorboard, tensorboardX); "wandb" or "mlflow", for the run that is active when the
            first step is over; "csv:<path>"; "name:text", for another package's entry point in the group
            `hallo_numguard.sinks`; or a `Sink` of your own. No run is ever started. Costs no synchronisation.
        keeper: `CheckpointKeeper` that counts clean and bad steps, and does the policy's rollbacks. The script
            calls its `save`; a `GuardedOptimizer` rolls back the run that was last saved.
    """

    mode: str = "replace"
    history: int = 64
    local_gradients: str = "on_alarm"
    check_updates: str = "part"
    policy: Policy = field(default_factory=Policy)
    name: str | None = None
    dump_dir: str | os.PathLike[str] | None = None
    repro_dir: str | os.PathLike[str] | None = None
    dump_keep: tuple[int, int] = (3, 10)
    sinks: Sequence[Any] = ()
    keeper: Any = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InvalidInput(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.local_gradients not in LOCAL_GRADIENTS:
            raise InvalidInput(
                f"local_gradients must be one of {', '.join(LOCAL_GRADIENTS)}, got {self.local_gradients!r}"
            )
        if self.check_updates not in CHECK_UPDATES:
            raise InvalidInput(f"check_updates must be one of {', '.join(CHECK_UPDATES)}, got {self.check_updates!r}")
        if not isinstance(self.history, int) or self.history < 1:
            raise InvalidInput(f"history must be a positive number of steps, got {self.history!r}")
        if not isinstance(self.policy, Policy):
            raise InvalidInput(f"policy must be a Policy, got {type(self.policy).__name__}")
        if self.name is not None and not _is_name(self.name):
            raise InvalidInput(f"name must be a printable text of 1 to {_MAX_NAME} characters, got {self.name!r}")
        for name in ("dump_dir", "repro_dir"):
            folder = getattr(self, name)
            if folder is not None and not isinstance(folder, (str, os.PathLike)):
                raise InvalidInput(f"{name} must be the path of a folder, got {folder!r}")
        if len(self.dump_keep) != 2 or not all(isinstance(number, int) and number >= 0 for number in self.dump_keep):
            raise InvalidInput(f"dump_keep must be two numbers of files, as in (3, 10), got {self.dump_keep!r}")
        if not isinstance(self.sinks, (list, tuple)):
            raise InvalidInput(f"sinks must be a list, got {self.sinks!r}")
        if self.keeper is not None and not all(hasattr(self.keeper, name) for name in ("clean_step", "rollback")):
            raise InvalidInput(f"keeper must be a CheckpointKeeper, got {type(self.keeper).__name__}")
        if self.keeper is None and "rollback" in (self.policy.on_unrecoverable, *self.policy.actions.values()):
            raise InvalidInput("the policy says rollback: give GuardConfig a keeper")


def _is_name(text: object) -> bool:
    return isinstance(text, str) and 0 < len(text) <= _MAX_NAME and text.isprintable() and not text.isspace()
