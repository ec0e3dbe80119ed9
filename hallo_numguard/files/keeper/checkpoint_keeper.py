"""Rotation of checkpoints that always keeps one that is known to be healthy."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from hallo_numguard.core.errors import CheckpointFailed, InvalidInput, NumericsError
from hallo_numguard.core.records import StepRecord
from hallo_numguard.files.keeper.health import health_problem, manifest_problem
from hallo_numguard.files.keeper.store import Checkpoint, Meta, Store, write_meta
from hallo_numguard.files.keeper.targets import Target, target_for
from hallo_numguard.files.manifest.write import write_manifest

_log = logging.getLogger("hallo_numguard")

T = TypeVar("T")


class CheckpointKeeper:
    """Saves checkpoints, finds out which are healthy, and rolls back to the last healthy one.

    A run is often damaged some steps before it shows. So a checkpoint is *healthy* when `healthy_after` steps in a row
    after it were clean, its bytes agree with its manifest, and a scan of its values found no error. Kept are the newest
    checkpoints, the last healthy one whatever its age, and the one that is next to be checked.

    Killing the process at any moment leaves all complete checkpoints in place. One run writes to a folder at a time.
    With several ranks the folder must be shared, and each rank creates a keeper and makes the same calls.

    Args:
        folder: Folder of the checkpoints; created when needed.
        keep: Number of newest checkpoints to keep.
        healthy_after: Number of clean steps in a row before a checkpoint is checked.

    Attributes:
        run: Run of the last `save`, for a guard that rolls it back; None before.
        save_gates: Functions that return, for a run, the context of its `save` on every rank; entering it may raise
            `NumericsError`. A guard that has this keeper adds one.

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
        self._clean_steps: dict[Checkpoint, int] = {}  # since each unchecked checkpoint, the oldest first
        self._last: StepRecord | None = None
        self.run: Any = None
        self.save_gates: list[Callable[[Any], contextlib.AbstractContextManager[None]]] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the same folder, and no guard."""
        return {**vars(self), "save_gates": []}

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

        Writes everything once; rank 0 reads it once for the manifest.

        Args:
            run: DeepSpeedEngine, accelerate.Accelerator, or dict of objects with `state_dict`, as in
                `{"model": model, "optimizer": optimizer}`.
            step: Number of optimizer steps so far; needed where neither the run nor a guard counts them.
            loss: Loss, saved beside the checkpoint (default: from the guard that has this keeper).
            grad_norm: Unscaled gradient norm, saved in the same way.
            loss_scale: Loss scale, saved in the same way.

        Raises:
            InvalidInput: If `run` cannot be saved, or `step` is missing.
            CheckpointFailed: On every rank, if writing failed; all other checkpoints stay unchanged. If DeepSpeed
                fails on some ranks only, the others wait in DeepSpeed until its time-out.
            NumericsError: On every rank, if the run is guarded, and what would be saved is not finite.
        """
        with contextlib.ExitStack() as stack:
            for gate in self.save_gates:
                stack.enter_context(gate(run))
            return self._save(run, step, loss, grad_norm, loss_scale)

    def _save(
        self, run: Any, step: int | None, loss: float | None, grad_norm: float | None, loss_scale: float | None
    ) -> Checkpoint:
        target = target_for(run)
        step = self._step_of(target, step)
        begun = self._on_rank_0("begin", lambda: self._store.begin(step))
        try:
            self._on_all_ranks("save", lambda: target.save(begun.path))
            meta = self._meta(target, step, loss, grad_norm, loss_scale)
            saved = self._on_rank_0("finish", lambda: self._finish(begun, meta))
        except BaseException:
            if _rank() == 0:
                shutil.rmtree(begun.path, ignore_errors=True)
            raise
        self._clean_steps[saved] = 0
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
            deleted = self._store.rotate(self._keep, spare=list(self._clean_steps)[:1])
        except OSError as error:
            _log.warning("old checkpoints could not be deleted; the next save tries again: %s", error)
            return
        for checkpoint in deleted:
            self._clean_steps.pop(checkpoint, None)
            _log.info("checkpoint %s was deleted: %d newer ones are kept", checkpoint, self._keep)

    def clean_step(self, record: StepRecord | None = None) -> None:
        """Counts a step whose loss and gradients were finite. A guard that has this keeper calls it.

        After the last clean step that a checkpoint needs, rank 0 reads the checkpoint twice; else it costs nothing.

        Args:
            record: Statistics of the step, if known.
        """
        self._last = record or self._last
        for checkpoint in self._clean_steps:
            self._clean_steps[checkpoint] += 1
        for checkpoint in [one for one, steps in self._clean_steps.items() if steps >= self._healthy_after]:
            del self._clean_steps[checkpoint]
            if _rank() == 0:
                self._check_health(checkpoint)

    def bad_step(self) -> None:
        """Counts a step that was not clean: unchecked checkpoints start counting again."""
        self._clean_steps = dict.fromkeys(self._clean_steps, 0)

    def _check_health(self, checkpoint: Checkpoint) -> None:
        """Checks a checkpoint that was followed by enough clean steps. A failure to do so does not stop training."""
        try:
            problem = health_problem(checkpoint.path)
            if problem is None:
                self._store.mark(checkpoint, "healthy", f"{self._healthy_after} clean steps, and a scan of its values")
                self._rotate()
                return
            self._store.mark(checkpoint, "rejected", problem)
            _log.warning("checkpoint %s is not healthy: %s", checkpoint, problem)
        except Exception as error:  # noqa: BLE001 - a full disk, a file that breaks a reader: training goes on
            _log.error(
                "checkpoint %s could not be checked, and does not count as healthy: %s", checkpoint, _in_words(error)
            )
            _log.debug("the traceback of that failure", exc_info=True)

    def latest_healthy(self) -> Checkpoint | None:
        """Returns the newest checkpoint that is healthy and unchanged since, or None.

        Reads that checkpoint, and logs why newer ones are skipped. Not collective: any one rank may call it.
        """
        for checkpoint in reversed(self._store.checkpoints()):
            status, reason = self._store.status(checkpoint)
            if status == "healthy":
                problem = manifest_problem(checkpoint.path)
                if problem is None:
                    return checkpoint
                reason = f"it is not as it was saved: {problem}"
            _log.warning("checkpoint %s is passed over: %s", checkpoint, reason)
        return None

    def rollback(self, run: Any) -> Checkpoint:
        """Loads the last healthy checkpoint into a run, also to resume one. Every rank must call it.

        Checkpoints that were not checked yet never will be, because the steps after them are discarded.

        Args:
            run: Run as for `save`.

        Raises:
            InvalidInput: If `run` cannot be saved.
            CheckpointFailed: On every rank, if there is no healthy checkpoint, or it cannot be loaded.
        """
        target = target_for(run)
        checkpoint = self._on_rank_0("find", self._find)
        self._on_all_ranks("load", lambda: target.load(checkpoint.path))
        self._clean_steps.clear()
        self._last = None
        return checkpoint

    def _find(self) -> Checkpoint:
        found = self.latest_healthy()
        if found is None:
            raise CheckpointFailed(f"there is no healthy checkpoint in {self._store.folder}")
        return found

    def _on_rank_0(self, what: str, work: Callable[[], T]) -> T:
        """Does something on rank 0, and returns its result, or raises its failure, on every rank."""
        outcome: list[Any] = [None, None]
        if _rank() == 0:
            try:
                outcome = [work(), None]
            except Exception as error:  # noqa: BLE001 - raised on every rank below, so that none waits for this one
                outcome = [None, _in_words(error)]
        if _world_size() > 1:
            dist.broadcast_object_list(outcome, src=0)
        result, problem = outcome
        if problem is not None:
            raise CheckpointFailed(f"could not {what}: {problem}")
        return cast(T, result)

    def _on_all_ranks(self, what: str, work: Callable[[], object]) -> None:
        """Does something on every rank, and raises on all of them if one fails."""
        problem = refusal = None
        try:
            work()
        except NumericsError as error:  # of a guard that does not have this keeper
            refusal, problem = error, _in_words(error)
        except Exception as error:  # noqa: BLE001 - raised on every rank below
            problem = _in_words(error)
        problems = [problem] * _world_size()
        if _world_size() > 1:
            dist.all_gather_object(problems, problem)
        if refusal is not None:
            raise refusal
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
