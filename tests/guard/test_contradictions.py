"""No report contradicts itself: every combination of evidence that the rules can meet, and every pair of its lines."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest

from hallo_numguard.core.frames import TensorRecord
from hallo_numguard.core.records import Offender, Record, Verdict
from hallo_numguard.core.sources import Source
from hallo_numguard.guard.diagnosis.evidence import Evidence, Replayed
from hallo_numguard.guard.diagnosis.rules import judge, needs_replay
from hallo_numguard.guard.loss_scaling import UNSCALED, LossScaling

RECORD = TensorRecord("output", (4, 3), "float32", Record(1, 0, 0, 1.0, 1.0, 7), (2, 1))


def offender(kind: str, name: str, nan: int = 1, inf: int = 0) -> Offender:
    return Offender(kind, name, name.rpartition(".")[0], 0, (0,), nan, inf, 0, 1.0, 4, (4,), "float32")


def source(kind: str, phase: str = "forward", module: str | None = "block", **fields) -> Source:
    name = "" if kind == "operation" else f"the {kind}"
    operation = "aten.div.Tensor" if kind == "operation" else ""
    node = "DivBackward0" if phase == "backward" else ""
    return Source(kind, name, operation, phase, node, "a.py:1 in f: x / y", module, "Block", 0, RECORD, **fields)


SOURCES = {
    "none": None,
    "forward": source("operation"),
    "hidden": source("operation", hidden_by=("aten.where.self (a.py:2)",)),
    "loss code": source("operation", module=None),
    "backward": source("operation", "backward"),
    "backward of the loss code": source("operation", "backward", None, is_singular=True),
    "a parameter": source("parameter"),
    "an input": source("input"),
    "a label": source("outside", module=None),
}
REPLAYS = {
    "none": None,
    "no answer": Replayed("the batch was not seen"),
    "bad seeds": Replayed(
        "the gradient that reached the model's output was not finite already", came_from_the_loss=True
    ),
    "clean": Replayed(),
    "forward": Replayed(origin=offender("activation", "block"), bad_ranks=1),
    "backward": Replayed(origin=offender("gradient", "block.weight"), bad_ranks=1, finite_unscaled=False),
    "scale": Replayed(origin=offender("gradient", "block.weight"), bad_ranks=1, finite_unscaled=True, settles_at=8.0),
    "one rank": Replayed(is_one_ranks_fault=True),
    "only compiled": Replayed(only_compiled=True),
    "whole step": Replayed(is_whole_step=True, finite_unscaled=False),
}
SCALINGS = {
    "unscaled": UNSCALED,
    "dynamic": LossScaling(65536.0, dynamic=True),
    "at its minimum": LossScaling(1.0, dynamic=True),
}
LOSSES = {"finite": None, "NaN": offender("loss", "loss")}
GRADIENTS = {
    "NaN": [offender("gradient", "block.weight")],
    "Inf": [offender("gradient", "block.weight", 0, 1)],
    "none": [],
}


def every_evidence():
    """Yields every combination that can come about, with its name."""
    axes = (LOSSES, GRADIENTS, SCALINGS, REPLAYS, SOURCES, (True, False), (None, 0, 1), (1, 2), (True, False))
    for loss, gradients, scaling, replay, found, shown, bad_ranks, world, batch in itertools.product(*axes):
        seen = Evidence(
            step=3,
            skipped=1,
            scaling=SCALINGS[scaling],
            suspects=[],
            bystanders=[],
            state=[],
            input=None,
            micro_batch=0,
            batch_known=batch,
            tensors=5,
            loss=LOSSES[loss],
            loss_known=True,
            loss_shown=shown,
            gradients=GRADIENTS[gradients],
            bad_ranks=bad_ranks if world > 1 else None,
            world_size=world,
            settles_at=None,
            after_the_model=("div", "log"),
        )
        answer = REPLAYS[replay]
        if (answer is None) == needs_replay(seen) or (loss == "finite" and gradients == "none"):
            continue
        if answer is None:
            yield (loss, gradients, scaling, "watched", found), replace(seen, watched=SOURCES[found])
            continue
        fits_loss = replay not in (
            ("backward", "scale", "bad seeds") if loss == "NaN" else ("forward", "only compiled")
        )
        has_source = replay in ("clean", "forward", "backward", "whole step")
        if not fits_loss or (found != "none" and not has_source) or (replay == "whole step" and found == "none"):
            continue
        if replay == "one rank" and world == 1:
            continue
        yield (loss, gradients, scaling, replay, found), replace(seen, replay=replace(answer, source=SOURCES[found]))


CONTRADICTIONS = [
    (r"the loss is finite", r"the loss is not finite"),
    (r"the model's output is finite", r"the model's output is not finite"),
    (r"the loss is finite", r"show it with watch_loss"),
    (r"the loss is not finite", r"the loss did not see it"),
    (r"was finite in every module", r"was not finite (either|on)"),
    (r"was finite in every module", r"made (NaN|Inf)"),
    (r"was finite in every module", r"the first module that turned"),
    (r"what the model was called with is finite", r"what the model was called with is not"),
    (r"what the model was called with is finite", r"the batch: what the model was called with was not seen"),
    (r"what the model was called with is finite", r"which the model was called with, holds"),
    (r"all 5 parameters and buffers that count are finite", r"(parameter|buffer) [\w ]+ holds \d"),
    (r"no answer from running the batch again", r"run again, was"),
    (r"no answer from running the batch again", r"shown by the batch, run again"),
    (r"that is outside of the model's call", r"the first module that turned"),
    (r"without loss scaling was finite", r"nor was it without loss scaling"),
    (r"it cannot be too high", r"Let the loss scale go on"),
    (r"every gradient element is finite", r"gradients? not finite"),
    (r"the loss scale has no part|The loss scale has no part", r"Let the loss scale go on"),
    (r"it was made after the model", r"made it in module"),
    (r"the operations after the model", r"that is outside of the model's call"),
]


@pytest.fixture(scope="module")
def reports():
    return {name: judge(seen) for name, seen in every_evidence()}


@pytest.fixture(scope="module")
def texts(reports):
    return {name: re.sub(r"\s+", " ", str(report)) for name, report in reports.items()}


def test_there_are_many(reports):
    assert len(reports) > 300
    assert {report.verdict for report in reports.values()} >= {
        Verdict.FORWARD_NONFINITE,
        Verdict.LOSS_NONFINITE,
        Verdict.BACKWARD_NONFINITE,
        Verdict.INPUT_NONFINITE,
        Verdict.WEIGHTS_NONFINITE,
        Verdict.SCALE_TOO_HIGH,
        Verdict.RANK_FAULT,
        Verdict.REDUCTION_OVERFLOW,
        Verdict.UNDETERMINED,
    }


@pytest.mark.parametrize(("one", "other"), CONTRADICTIONS)
def test_no_two_lines_contradict_each_other(texts, one, other):
    for name, text in texts.items():
        assert not (re.search(one, text) and re.search(other, text)), f"{name}\n{text}"


def test_hardware_is_accused_by_one_verdict_alone(reports):
    for name, report in reports.items():
        accuses = "Suspect the hardware" in str(report)
        assert accuses == (report.verdict is Verdict.RANK_FAULT), name


def test_a_verdict_says_what_has_shown_it(reports):
    for name, report in reports.items():
        if report.first is not None and report.first.operation is not None:
            assert report.known_from, name


def _overflowed(replay, **fields):
    seen = next(seen for (loss, gradients, scaling, *_), seen in every_evidence() if gradients == "Inf")
    gradients = [replace(GRADIENTS["Inf"][0], dtype="float16")]
    return judge(replace(seen, gradients=gradients, loss=None, watched=None, replay=replay, **fields))


def test_a_scale_is_not_expected_to_settle_above_itself():
    sum_is_too_large = Replayed(micro_batch=3, gradient_sum=100_000.0, rank_sum=100_000.0)
    scaling = LossScaling(2.0**16, dynamic=True)
    report = _overflowed(sum_is_too_large, scaling=scaling, proved_before=2.0**17, bad_ranks=None, world_size=2)
    assert (report.verdict, report.settles_at, report.provisional) == (Verdict.SCALE_TOO_HIGH, None, True)
    assert "what is too large may be their sum" in " ".join(report.evidence)


@pytest.mark.parametrize(
    ("copies", "verdict"), [(None, Verdict.RANK_FAULT), (2, Verdict.RANK_FAULT), (1, Verdict.UNDETERMINED)]
)
def test_a_stage_without_copies_is_not_compared_with_others(copies, verdict):
    report = _overflowed(Replayed(is_one_ranks_fault=True), bad_ranks=1, world_size=2, copies=copies)
    assert report.verdict is verdict
