"""What `hallo-numguard report` prints and writes, but for the page."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

import hallo_numguard as ng
from hallo_numguard.cli import main
from hallo_numguard.core import frames
from hallo_numguard.report import inputs as files
from hallo_numguard.report import terminal
from hallo_numguard.report.html import page
from hallo_numguard.report.terminal import sparkline

import json_schemas
import report_support as support
from report_support import GOLDENS


def run(*arguments):
    return CliRunner().invoke(main, ["report", *map(str, arguments)], env={"COLUMNS": "200"})


def printed(inputs):
    console = Console(width=110, color_system=None)
    with console.capture() as capture:
        console.print(terminal.render(inputs))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


@pytest.fixture
def trace_file(tmp_path):
    return support.write_trace(tmp_path, support.trace())


# -- what is printed -------------------------------------------------------------------------------------------------


def test_a_terminal_shows_what_it_did_before(trace_file):
    """Verdict, evidence, advice, offenders, history, what hides NaN, and the first call of a trace."""
    support.compare(GOLDENS / "terminal.txt", printed(files.read([*support.REAL, trace_file])))


def test_a_trace_that_stayed_finite_says_so(tmp_path):
    path = support.write_trace(tmp_path, frames.Frames((), None, dropped=3), "finite.jsonl")
    assert "everything stayed finite" in run(path).output


def test_json_holds_every_document(trace_file):
    document = json.loads(run(*support.REAL, trace_file, "--format", "json").stdout)
    assert [(one["file"], one["rank"]) for one in document["reports"]] == [
        (path.name, rank) for path, rank in zip(support.REAL, (0, 0, 1), strict=True)
    ]
    for one, path in zip(document["reports"], support.REAL, strict=True):
        assert one["report"] == json.loads(path.read_text())
    (trace,) = document["traces"]
    assert trace["first_nonfinite"]["name"] == "encoder.1.proj"
    assert len(trace["frames"]) == 18


def test_it_works_where_torch_is_not_installed(tmp_path, trace_file):
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.partition('.')[0] in {'torch', 'numpy', 'deepspeed', 'triton', 'transformers'}:\n"
        "            raise ImportError(f'{name} is blocked')\n"
        "sys.meta_path.insert(0, Block())\n"
        "from hallo_numguard.cli import main\n"
        "main()\n"
    )
    written, timeline = tmp_path / "page.html", tmp_path / "timeline.json"
    arguments = ["report", *support.REAL, trace_file, "--html", written, "--perfetto", timeline]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "weights_nonfinite" in done.stdout
    assert "hidden.weight" in written.read_text(encoding="utf-8")
    assert json.loads(timeline.read_text(encoding="utf-8"))["traceEvents"]


def test_without_plotly_the_extra_is_named_and_the_rest_works(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    done = run(support.REAL[0], "--html", tmp_path / "page.html")
    assert done.exit_code == 2
    assert "pip install 'hallo-numguard[report]'" in done.stderr
    assert run(support.REAL[0]).exit_code == 0


def test_a_trace_of_a_real_model_follows_the_schema_and_is_shown(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight[2] = float("nan")
    with ng.trace(model) as tracer:
        model(torch.ones(3, 4)).sum().backward()
    path = tmp_path / "trace.jsonl"
    tracer.save(path)
    check = json_schemas.validator("trace")
    for line in path.read_text().splitlines():
        check.validate(json.loads(line))
    done = run(path, "--perfetto", tmp_path / "timeline.json")
    assert done.exit_code == 0
    assert "holds 1 NaN" in done.output
    (drawn,) = page.content(files.read([path]))["figures"]["grids"]
    assert [drawn["rows"][row] for row in drawn["first"]] == ["1"]


# -- files that are no good ------------------------------------------------------------------------------------------


DAMAGED = {
    "empty": b"",
    "not_json": b"PK\x03\x04",
    "another_json": b'{"answer": 42}',
    "a_list": b"[1, 2]",
    "of_a_later_version": b'{"schema_version": 99}',
    "not_utf8": b'{"schema_version": 1, "step": "\xff"}',
    "deep": b"[" * 100_000,
    "gzip_of_nothing": b"\x1f\x8b",
    "a_trace_cut_short": b'{"schema_version": 1, "kind": "trace", "dropped": 0, "first_nonfinite": null}\n{"pos',
    "a_trace_of_a_later_version": b'{"schema_version": 2, "kind": "trace"}\n',
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_a_file_that_cannot_be_read_is_named_with_the_cause(tmp_path, data):
    path = tmp_path / "odd.json"
    path.write_bytes(data)
    done = run(support.REAL[0], path)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"Error: {path}")
    assert len(done.stderr) < 1100


def test_a_page_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    done = run(support.REAL[0], "--html", tmp_path / "file" / "page.html")
    assert done.exit_code == 2
    assert "cannot be written" in done.stderr


def damaged_documents():
    """A real report with one value at a time replaced by one of another type."""
    document = json.loads(support.LAST_STEP[0].read_text())
    for key in document:
        for value in ("odd", ["odd"], {"odd": 1}, None, 1e400):
            yield {**document, key: value}
    for key in document["offenders"][0]:
        yield {**document, "offenders": [{**document["offenders"][0], key: {"odd": []}}]}
    for key in document["history"]["steps"][0]:
        steps = [{**document["history"]["steps"][0], key: ["odd"]}]
        yield {**document, "history": {**document["history"], "steps": steps}}


def test_values_of_other_types_are_refused_or_shown_but_never_break_anything(tmp_path):
    path = tmp_path / "damaged.json"
    for document in damaged_documents():
        path.write_text(json.dumps(document))
        done = run(path)
        assert done.exit_code in (0, 2), done.exception
        assert done.exit_code == 0 or str(path) in done.stderr


def test_a_trace_with_values_of_other_types_is_refused(tmp_path):
    path = support.write_trace(tmp_path, support.trace(), "trace.jsonl")
    header, first, *rest = path.read_text().splitlines()
    for key in ("position", "name", "call", "parent"):
        path.write_text("\n".join([header, json.dumps({**json.loads(first), key: ["odd"]}), *rest]))
        done = run(path)
        assert done.exit_code == 2
        assert "is damaged" in done.stderr


# -- names that mean harm ----------------------------------------------------------------------------------------------


def test_hostile_names_reach_a_terminal_as_text(tmp_path):
    path = support.write_report(tmp_path, support.hostile_report())
    done = run(path, support.write_trace(tmp_path, support.trace(prefix=support.HOSTILE[3])))
    assert done.exit_code == 0
    assert "[/x][bold]shout" in done.output
    assert "<script>alert(1)</script>" in done.output
    for character in "\x1b\x07\x00\u202e":
        assert character not in done.output
    assert len(done.output) < 40_000


def test_hostile_names_reach_a_log_as_text():
    text = str(support.hostile_report())
    assert "[/x][bold]shout" in text
    assert not any(character in text for character in "\x1b\x07\x00\u202e\ud800")
    assert len(text) < 20_000


def test_hostile_names_survive_the_json_documents(tmp_path):
    path = support.write_report(tmp_path, support.hostile_report())
    document = json.loads(run(path, "--format", "json").stdout)
    assert [one["name"] for one in document["reports"][0]["report"]["offenders"]] == list(support.HOSTILE)


# -- sparklines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "logarithmic", "line"),
    [
        ([], False, ""),
        ([1.0, 1.0], False, "▁▁"),
        ([0.0, 7.0, 3.0], False, "▁█▄"),
        ([None, 1.0, float("nan"), float("-inf"), 2.0], False, " ▁××█"),
        ([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0], True, "▁▂▃▄▅▆▇█"),
        ([0.0, 1.0, 2.0], True, "▁▁█"),
        ([-1.7e308, 1.7e308], False, "▁█"),
        ([float("nan")], True, "×"),
    ],
)
def test_a_sparkline_has_a_character_a_value(values, logarithmic, line):
    assert sparkline(values, logarithmic) == line


def test_reports_of_two_runs_in_one_folder_are_not_ranks_of_one_step(tmp_path):
    runs = ("20260102T030405Z-bbbbbb", "20260101T030405Z-aaaaaa")
    for run, step in zip(runs, (5, 9), strict=True):
        for rank in (0, 1):
            one = dataclasses.replace(support.report(["a"], ["a"], step=step), environment={"rank": rank, "run": run})
            (tmp_path / f"overflow-step{step:08d}-rank{rank}-{run}.json").write_text(one.to_json())
            same_step = dataclasses.replace(one, step=7)
            (tmp_path / f"overflow-step00000007-rank{rank}-{run}.json").write_text(same_step.to_json())
    overflows = files.read(sorted(tmp_path.iterdir())).overflows
    found = [(item.report.environment["run"], item.report.step, len(item.ranks)) for item in overflows]
    assert found == [(runs[1], 7, 2), (runs[1], 9, 2), (runs[0], 5, 2), (runs[0], 7, 2)]
