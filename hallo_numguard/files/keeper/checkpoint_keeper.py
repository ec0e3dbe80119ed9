"""Checkpoints of which one is always known to be good."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hallo_numguard.core.errors import CheckpointFailed, InvalidInput
from hallo_numguard.core.records import StepRecord
from hallo_numguard.files.keeper.health import changed, illness
from hallo_numguard.files.keeper.store import Checkpoint, Meta, Store, write_meta
from hallo_numguard.files.keeper.targets import Target, target_for
from hallo_numguard.files.manifest.write import write_manifest

_log = logging.getLogger("hallo_numguard")

T = TypeVar("T")


class CheckpointKeeper:
    """Saves checkpoints, finds out which are healthy, and goes back to the last of those.

    A checkpoint is *healthy* when so many steps in a row after it were clean, its bytes are those of its manifest, and
    a scan of its values found nothing: a run is often damaged some steps before it shows. The newest are kept, the last
    healthy one whatever its age, and the one that is next to be proved.

    A process that is killed at any moment leaves the checkpoints that were there. One run writes to a folder at a time;
    with several ranks it must be one that all of them see, and each rank makes a keeper and calls it alike.

    Args:
        folder: Is made if it is not there.
        keep: Number of the newest that are kept.
        healthy_after: Clean steps in a row until a checkpoint is looked at.

    Attributes:
        run: What `save` was last given, for a guard that goes back to it; None before.

    Raises:
        InvalidInput: If a number is not positive.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3, healthy_after: int = 20) -> None:
        for name, value in {"keep": keep, "healthy_after": healthy_after}.items():
            if not isinstance(value, int) or value < 1:
                raise InvalidInput(f"{name} must be a positive number, got {value!r}")
        self._store = Store(Path(folder))
        self._keep = keep
        self._healthy_after = healthy_after
        self._waiting: dict[Checkpoint, int] = {}  # clean steps since each, the oldest first
        self._last: StepRecord | None = None
        self.run: Any = None

    # -- saving ------------------------------------------------------------------------------------------------------

    def save(
        self,
        run: Any,
        step: int | None = None,
        *,
        loss: float | None = None,
        grad_norm: float | None = None,
        loss_scale: float | None = None,
    ) -> Checkpoint:
        """Saves a run, with a manifest. Every rank must call it.

        Args:
            run: A DeepSpeedEngine, an accelerate.Accelerator, or a dict of what has `state_dict`, as in
                `{"model": model, "optimizer": optimizer}`.
            step: Optimizer steps so far; needed where neither the run nor a guard counts them.
            loss: To be written beside it, as are `grad_norm` and `loss_scale`; a guard that was given this keeper
                knows them.
            grad_norm: Of the gradients, unscaled.
            loss_scale: In force.

        Raises:
            InvalidInput: If `run` is nothing of the kind, or `step` is missing.
            CheckpointFailed: If it could not be written, on every rank; nothing else is changed. A rank on which
                DeepSpeed itself fails while the others wait for it in DeepSpeed ends in their time-out.

        Cost: one write of everything, and one read for the manifest, on rank 0.
        """
        target = target_for(run)
        step = self._step_of(target, step)
        begun = self._together("begin", lambda: self._store.begin(step))
        try:
            self._everywhere("save", lambda: target.save(begun.path))
            meta = self._meta(target, step, loss, grad_norm, loss_scale)
            saved = self._together("finish", lambda: self._finish(begun, meta))
        except BaseException:
            if _rank() == 0:
                shutil.rmtree(begun.path, ignore_errors=True)
            raise
        self._waiting[saved] = 0
        self.run = run
        if _rank() == 0:
            self._rotate()
        return saved

    def _step_of(self, target: Target, step: int | None) -> int:
        counted = target.step() if step is None else step
        if counted is None and self._last is not None:
            counted = self._last.step
        if counted is None:
            raise InvalidInput(f"{target.saved_by} does not count steps: give save() the number as step=...")
        return counted

    def _meta(
        self, target: Target, step: int, loss: float | None, grad_norm: float | None, loss_scale: float | None
    ) -> Meta:
        last = self._last
        if last is not None:
            loss = last.loss if loss is None else loss
            grad_norm = last.norm / last.loss_scale if grad_norm is None else grad_norm
            loss_scale = last.loss_scale if loss_scale is None else loss_scale
        return Meta(step, loss, grad_norm, loss_scale, _rng_digest(), _world_size(), target.saved_by, time.time())

    def _finish(self, begun: Checkpoint, meta: Meta) -> Checkpoint:
        write_meta(begun.path, meta)
        report = write_manifest(begun.path)
        if report.unchecked:
            raise CheckpointFailed("; ".join([*report.unchecked, *(finding.message for finding in report.findings)]))
        return self._store.commit(begun)

    def _rotate(self) -> None:
        try:
            deleted = self._store.rotate(self._keep, spare=list(self._waiting)[:1])
        except OSError as error:
            _log.warning("old checkpoints could not be deleted, and are tried again after the next: %s", error)
            return
        for checkpoint in deleted:
            self._waiting.pop(checkpoint, None)
            _log.info("checkpoint %s was deleted: %d newer ones are kept", checkpoint, self._keep)

    # -- health ------------------------------------------------------------------------------------------------------

    def clean_step(self, record: StepRecord | None = None) -> None:
        """Counts a step whose loss and gradients were finite. A guard that was given this keeper calls it.

        Args:
            record: Its figures, if they are known.

        Cost: nothing, but for the step with which a checkpoint has been proved: rank 0 then reads it twice.
        """
        self._last = record or self._last
        for checkpoint in self._waiting:
            self._waiting[checkpoint] += 1
        for checkpoint in [one for one, steps in self._waiting.items() if steps >= self._healthy_after]:
            del self._waiting[checkpoint]
            if _rank() == 0:
                self._judge(checkpoint)

    def bad_step(self) -> None:
        """Notes a step that was not clean: those that wait to be proved begin anew."""
        self._waiting = dict.fromkeys(self._waiting, 0)

    def _judge(self, checkpoint: Checkpoint) -> None:
        """Looks at a checkpoint that was followed by enough clean steps. Its failure is no reason to stop training."""
        try:
            reason = illness(checkpoint.path)
            if reason is None:
                self._store.mark(checkpoint, "healthy", f"{self._healthy_after} clean steps, and a scan of its values")
                self._rotate()
                return
            self._store.mark(checkpoint, "rejected", reason)
            _log.warning("checkpoint %s is not healthy: %s", checkpoint, reason)
        except Exception:  # noqa: BLE001 - a disk that is full, a file that no reader can stand: training goes on
            _log.exception("checkpoint %s could not be looked at, and is not called healthy", checkpoint)

    def latest_healthy(self) -> Checkpoint | None:
        """Returns the newest checkpoint that is healthy and unchanged since; None if there is none.

        Logs which newer ones it passes over, and why. For one rank: no other takes part.

        Cost: reads the one that it returns.
        """
        for checkpoint in reversed(self._store.checkpoints()):
            status, reason = self._store.status(checkpoint)
            if status == "healthy":
                difference = changed(checkpoint.path)
                if difference is None:
                    return checkpoint
                reason = f"it is not as it was saved: {difference}"
            _log.warning("checkpoint %s is passed over: %s", checkpoint, reason)
        return None

    # -- going back --------------------------------------------------------------------------------------------------

    def rollback(self, run: Any) -> Checkpoint:
        """Puts a run back to the last healthy checkpoint; also to resume one. Every rank must call it.

        Checkpoints that waited to be proved never will be: what came after them is what is left behind.

        Args:
            run: As for `save`.

        Raises:
            InvalidInput: If `run` is nothing of the kind.
            CheckpointFailed: If there is no healthy checkpoint, or it cannot be loaded, on every rank.
        """
        target = target_for(run)
        checkpoint = self._together("find", self._found)
        self._everywhere("load", lambda: target.load(checkpoint.path))
        self._waiting.clear()
        self._last = None
        return checkpoint

    def _found(self) -> Checkpoint:
        found = self.latest_healthy()
        if found is None:
            raise CheckpointFailed(f"there is no healthy checkpoint in {self._store.folder}")
        return found

    # -- ranks -------------------------------------------------------------------------------------------------------

    def _together(self, what: str, work: Callable[[], T]) -> T:
        """Lets rank 0 do something, and returns its result on every rank, or raises its failure there."""
        answer: list[Any] = [None, None]
        if _rank() == 0:
            try:
                answer = [work(), None]
            except Exception as error:  # noqa: BLE001 - raised on every rank, none of which must wait for this one
                answer = [None, _in_words(error)]
        if _world_size() > 1:
            dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise CheckpointFailed(f"could not {what}: {answer[1]}")
        result: T = answer[0]
        return result

    def _everywhere(self, what: str, work: Callable[[], None]) -> None:
        """Lets every rank do something, and raises on all of them if one fails."""
        problem = None
        try:
            work()
        except Exception as error:  # noqa: BLE001 - likewise
            problem = _in_words(error)
        problems = [problem] * _world_size()
        if _world_size() > 1:
            dist.all_gather_object(problems, problem)
        for rank, problem in enumerate(problems):
            if problem is not None:
                raise CheckpointFailed(f"could not {what} on rank {rank}: {problem}")


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, CheckpointFailed) else f"{type(error).__name__}: {error}"


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rng_digest() -> str:
    digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    for state in torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []:
        digest.update(state.numpy().tobytes())
    return digest.hexdigest()
