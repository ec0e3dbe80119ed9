"""Reports as records and text, and the published schemas of reports and traces."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.core.records import Verdict
from hallo_numguard.report import inputs as files
from hallo_numguard.report.html import page

import json_schemas
import report_support as support


def test_the_environment_is_read_back_and_does_not_count_in_comparisons():
    real = OverflowReport.from_json(support.LAST_STEP[0].read_text())
    assert real.environment["hostname"] == "node-0"
    assert replace(real, environment={}) == real
    older = {key: value for key, value in json.loads(real.to_json()).items() if key != "environment"}
    assert OverflowReport.from_json(json.dumps(older)).environment == {}


def test_a_step_that_was_applied_all_the_same_is_not_called_skipped():
    (last, _) = (OverflowReport.from_json(path.read_text()) for path in support.LAST_STEP)
    report = replace(last, consecutive_skips=0)
    overflow = files.Overflow((files.RankReport("file", 0, report),))
    banner = page.content(files.ReportInputs((overflow,), ()))["banner"]["step"]
    for shown in (str(report), report.headline(), banner):
        assert "was applied all the same" in shown
        assert "was skipped" not in shown


def test_only_what_is_undetermined_is_called_not_proved():
    report = OverflowReport.from_json(support.LAST_STEP[0].read_text())
    proved = replace(report, verdict=Verdict.FORWARD_NONFINITE, recoverable=None)
    assert "forward_nonfinite (it may come back)" in str(proved)
    assert "undetermined (cause not proved)" in str(replace(proved, verdict=Verdict.UNDETERMINED))


def test_a_report_on_a_save_begins_with_what_happened():
    report = replace(support.hostile_report(), happened="save_model was about to write \x1b[2J.")
    text = str(report)
    assert text.startswith("save_model was about to write \ufffd[2J.\n  what to do")
    assert "its gradients are not finite (" not in text
    assert report.headline().startswith("save_model was about to write")
    assert report.rows()[0] == ("happened", ["save_model was about to write \ufffd[2J."])
    assert OverflowReport.from_json(report.to_json()).happened == report.happened


# -- schemas -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["report", "trace"])
def test_published_schemas_are_those_of_the_dataclasses(name):
    support.compare(json_schemas.path_of(name), getattr(json_schemas, f"{name}_schema")())


def test_real_reports_follow_the_schema():
    check = json_schemas.validator("report")
    for path in support.REAL:
        check.validate(json.loads(path.read_text()))
    check.validate(json.loads(support.hostile_report().to_json()))


@pytest.mark.parametrize(
    "change",
    [
        {"step": "21"},
        {"verdict": "fine"},
        {"recoverable": "no"},
        {"loss_scale": "large"},
        {"offenders": [{"name": "x"}]},
        {"evidence": "one"},
        {"schema_version": 2},
        {"more": 1},
        {"environment": {"hides_nan": {"all": True}}},
    ],
    ids=str,
)
def test_broken_reports_do_not_follow_the_schema(change):
    document = json.loads(support.LAST_STEP[0].read_text())
    assert not json_schemas.validator("report").is_valid({**document, **change})


def test_traces_follow_the_schema(tmp_path):
    check = json_schemas.validator("trace")
    lines = support.write_trace(tmp_path, support.trace(), "trace.jsonl").read_text().splitlines()
    for line in lines:
        check.validate(json.loads(line))
    header, frame = json.loads(lines[0]), json.loads(lines[1])
    assert not check.is_valid({**header, "kind": "report"})
    assert not check.is_valid({**header, "first_nonfinite": {}})
    assert not check.is_valid({**frame, "position": "0"})
    assert not check.is_valid({**frame, "outputs": [{"name": "output[0]"}]})
    assert not check.is_valid({key: value for key, value in frame.items() if key != "cls"})
