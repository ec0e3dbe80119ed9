"""Bundles that reproduce an overflow: all that repeats the bad call in one process, without the framework."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hallo_numguard.core.atomic_files import write_folder
from hallo_numguard.core.documents import encode
from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.core.records import Verdict
from hallo_numguard.guard.collectives import Ranks
from hallo_numguard.guard.diagnosis.replay import Replayer
from hallo_numguard.guard.report_files import ReportFiles
from hallo_numguard.guard.step.model_call import ModelCall
from hallo_numguard.tracing.capture import Captured
from hallo_numguard.tracing.nested import whole_bytes

_log = logging.getLogger("hallo_numguard")

MAX_BUNDLES = 8  # per run
MAX_WEIGHT_BYTES = 1 << 30
_VERDICTS_WITHOUT_BUNDLE = (Verdict.SCALE_TOO_HIGH, Verdict.REDUCTION_OVERFLOW)
_KINDS_IN_A_MODULE = ("parameter", "buffer", "activation", "gradient")


@dataclass(frozen=True)
class Bundle:
    """Captured data of a bad step, not on disk yet.

    Attributes:
        call: Call of the model in the bad micro-batch; None if it was not kept, or was changed since.
        captured: Call of the module that is named, or why there is none.
    """

    call: ModelCall | None
    captured: Captured | str


class Bundles:
    """Captures and writes bundles.

    Args:
        folder: Folder to write them to; None for none.
        files: Writes them, and deletes older ones.
        module: The model.
        replayer: Runs passes of the step again; None if that is impossible.
        ranks: Ranks that take part.
        device: Device on which ranks reduce small tensors.
        settings: The framework's configuration.
    """

    def __init__(
        self,
        folder: Path | None,
        files: ReportFiles,
        module: nn.Module | None,
        replayer: Replayer | None,
        ranks: Ranks,
        device: torch.device,
        settings: Mapping[str, Any],
    ) -> None:
        self._folder = folder
        self._report_files = files
        self._module = module
        self._replayer = replayer
        self._ranks = ranks
        self._device = device
        self._settings = settings
        self._taken = 0

    def take(self, report: OverflowReport, micro_batch: int, number: int) -> Bundle | None:
        """Captures the data of a bundle. All ranks call it with the same report: it may run the batch again.

        Args:
            report: Report on the step.
            micro_batch: Position of the bad one in the step.
            number: Number of calls of the named module before the bad one, in that micro-batch.
        """
        if report.verdict in _VERDICTS_WITHOUT_BUNDLE or self._replayer is None or self._taken >= MAX_BUNDLES:
            return None
        if not self._ranks.lowest(int(self._folder is not None), self._device):
            return None
        self._taken += 1
        failure_reason = self._reason_for_no_call(report)
        captured: Captured | str = failure_reason
        if not failure_reason and report.first is not None:
            captured = self._replayer.capture(report.first.module, number, micro_batch)
        return Bundle(self._replayer.call(micro_batch), captured)

    def write(self, report: OverflowReport, bundle: Bundle) -> None:
        """Writes a bundle on the rank that is named, else on rank 0."""
        rank = 0 if report.first is None or report.first.rank is None else report.first.rank
        if self._folder is None or self._ranks.rank != rank:
            return
        folder, files = self._folder, self._files(report, bundle)

        def write() -> Path:
            name = f"repro-step{report.step:08d}-rank{rank}-{self._ranks.run_id}"
            return write_folder(folder / name, files)

        written = self._report_files.write(report.verdict.value, write, list(files))
        if written is not None:
            _log.warning("to reproduce this in one process: python %s", written / "reproduce.py")

    def _reason_for_no_call(self, report: OverflowReport) -> str:
        """Why there is no single call to be captured, "" if there is one; the same on every rank."""
        first = report.first
        if first is None or first.kind not in _KINDS_IN_A_MODULE:
            return "no module is to blame"
        if report.verdict is Verdict.RANK_FAULT:
            return "the same batch was finite when it was run again"
        if self._module is None or first.module not in dict(self._module.named_modules()):
            return f"{first.module} is no module of the model"
        size = sum(map(whole_bytes, self._module.get_submodule(first.module).parameters()))
        return "the module is larger than 1 GiB" if size > MAX_WEIGHT_BYTES else ""

    def _files(self, report: OverflowReport, bundle: Bundle) -> dict[str, bytes]:
        captured, call = bundle.captured, bundle.call
        parts: dict[str, bytes | str] = {
            "call": _pickled(vars(captured)) if isinstance(captured, Captured) else captured,
            "batch": "it was not kept, or was changed since" if call is None else _pickled(self._batch(call)),
        }
        about = {
            "step": report.step,
            "rank": self._ranks.rank,
            "verdict": report.verdict.value,
            "first": str(report.first or "no tensor is named"),
            "module": "" if report.first is None else report.first.module,
            "main": _main_file() if any(isinstance(p, bytes) and b"__main__" in p for p in parts.values()) else "",
            **{f"why_no_{name}": part if isinstance(part, str) else "" for name, part in parts.items()},
        }
        return {
            "bundle.json": _json(about),
            "config.json": _json(self._settings),
            "report.json": report.to_json().encode(),
            "reproduce.py": resources.files(__package__).joinpath("reproduce.py").read_bytes(),
            **{f"{name}.pt": part for name, part in parts.items() if isinstance(part, bytes)},
        }

    def _batch(self, call: ModelCall) -> dict[str, Any]:
        return {
            "args": call.args,
            "kwargs": dict(call.kwargs),
            "random": call.random.by_device(),
            "seeds": call.seeds,
            "training": self._module is not None and self._module.training,
            "autocast": call.autocast.name_on(self._device.type),
        }


def _main_file() -> str:
    """The training script: what it defines is pickled under a name that means something else in another process."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    return "" if file is None else str(Path(file).resolve())


def _json(value: Any) -> bytes:
    return json.dumps(encode(value), indent=1, default=str, allow_nan=False).encode()


def _pickled(value: Any) -> bytes | str:
    """The value as torch.save writes it, or why it cannot be written."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
    except Exception as error:  # noqa: BLE001 - whatever a foreign object raises when it is pickled
        return f"it cannot be pickled: {error}"
    return file.getvalue()
