"""Reports and bundles on disk: how many are kept, and what a disk or a folder that fails costs."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import hallo_numguard as ng
from hallo_numguard.guard import session
from hallo_numguard.guard.report_files import ReportFiles


def make(**settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    config = ng.GuardConfig(policy=ng.Policy(max_consecutive_skips=1000), **settings)
    return model, ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3), model, config)


def step(model, optimizer, bad=True):
    x = torch.ones(16, 4)
    if bad:
        x[3, 2] = float("nan")
    optimizer.zero_grad()
    optimizer.watch_loss(model(x).square().mean()).backward()
    optimizer.step()


def numbers(folder):
    return sorted(int(path.name.split("step")[1][:8]) for path in folder.iterdir() if "step" in path.name)


def test_the_first_of_each_verdict_and_the_last_are_kept(tmp_path):
    (tmp_path / "overflow-step00000000-rank0.json").write_text("of another run")
    (tmp_path / "notes.txt").write_text("the user's")
    model, optimizer = make(dump_dir=tmp_path)
    for number in range(1, 31):
        handle = model[0].register_forward_hook(lambda module, args, output: output * float("inf"))
        if number != 8:
            handle.remove()
        step(model, optimizer, bad=number != 8)
        handle.remove()
    first_of_each = [1, 2, 3, 8]
    assert numbers(tmp_path) == [0, *first_of_each, *range(21, 31)]
    assert (tmp_path / "notes.txt").exists()


def test_bundles_are_kept_likewise_but_for_what_was_added_to_them(tmp_path):
    model, optimizer = make(repro_dir=tmp_path, dump_keep=(1, 2))
    for number in range(1, 6):
        step(model, optimizer)
        if number == 2:
            (bundle,) = tmp_path.glob("repro-step00000002-rank0-*")
            (bundle / "analysis.txt").write_text("the user's")
    assert numbers(tmp_path) == [1, 2, 4, 5]
    assert [path.name for path in bundle.iterdir()] == ["analysis.txt"]


@pytest.mark.parametrize("keep", [(1,), (-1, 3), (1.5, 3), (1, 2, 3)])
def test_other_numbers_are_refused(keep):
    with pytest.raises(ng.InvalidInput, match="dump_keep"):
        ng.GuardConfig(dump_keep=keep)


def test_a_file_that_is_written_again_counts_once(tmp_path):
    files = ReportFiles("the report", (0, 2))

    def write(name):
        def work() -> Path:
            (tmp_path / name).write_text(name)
            return tmp_path / name

        files.write("kind", work)

    for name in ("a", "b", "b", "b"):
        write(name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def place(tmp_path, problem):
    if problem == "NUL":
        return str(tmp_path / "with\0nul")
    if problem == "file":
        (tmp_path / "file").write_text("no folder")
        return tmp_path / "file" / "dump"
    return tmp_path / "dump"


@pytest.mark.parametrize("problem", ["NUL", "file", "full"])
def test_a_folder_that_cannot_be_used_costs_the_files_alone(problem, tmp_path, monkeypatch, caplog):
    folder = place(tmp_path, problem)
    model, optimizer = make(dump_dir=folder, repro_dir=folder)
    if problem == "full":

        def full(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
    with caplog.at_level(logging.ERROR, "hallo_numguard"):
        for _ in range(4):
            step(model, optimizer)
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert [text.partition(" could not")[0] for text in errors] == ["the report", "the bundle"], "each once"
    assert not any("\n" in text for text in errors)
    assert len(optimizer.history) == 4
    if problem == "full":
        assert list(folder.iterdir()) == [], "nothing half written"
        monkeypatch.undo()
        step(model, optimizer)
        assert len(list(folder.iterdir())) == 2, "later ones are tried again"


def test_a_folder_that_is_removed_is_made_again(tmp_path):
    model, optimizer = make(dump_dir=tmp_path / "a" / "b")
    step(model, optimizer)
    shutil.rmtree(tmp_path / "a")
    step(model, optimizer)
    assert numbers(tmp_path / "a" / "b") == [2]


def test_losses_of_a_step_that_never_comes_are_bounded(monkeypatch):
    monkeypatch.setattr(session, "MAX_LOSSES", 8)
    model, optimizer = make()
    for _ in range(100):
        optimizer.watch_loss(model(torch.ones(2, 4)).square().mean())
    assert len(optimizer._guard.session._steps.pending.losses) <= 8
    step(model, optimizer)
    assert optimizer.last_report.verdict == "input_nonfinite"
    assert optimizer._guard.session._steps.pending.losses == []


def test_runs_into_one_folder_replace_nothing_of_each_other_and_delete_nothing(tmp_path):
    for _ in range(2):
        model, optimizer = make(dump_dir=tmp_path, repro_dir=tmp_path, dump_keep=(0, 1))
        for _ in range(3):
            step(model, optimizer)
    assert numbers(tmp_path) == [3, 3, 3, 3]
    reports = [ng.OverflowReport.from_json(path.read_text()) for path in sorted(tmp_path.glob("overflow-*.json"))]
    runs = [report.environment["run"] for report in reports]
    assert len(set(runs)) == 2
    assert all(
        name.endswith(run) for name, run in zip(sorted(p.stem for p in tmp_path.glob("*.json")), runs, strict=True)
    )


def test_the_same_step_again_replaces_no_report(tmp_path):
    model, optimizer = make(dump_dir=tmp_path)
    step(model, optimizer)
    optimizer._guard.session._reporter.keep(optimizer.last_report)
    first, second = sorted(tmp_path.iterdir())
    assert {first.suffix, second.suffix} == {".json"}
    assert first.read_text() == second.read_text()


def test_a_report_says_of_which_run_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--lr", "0.1", "--hub-token", "hf_" + "a" * 30, "--api_key=abc"])
    model, optimizer = make(name="first try")
    step(model, optimizer)
    report = optimizer.last_report
    facts = report.environment
    assert (facts["name"], facts["world_size"], facts["framework"], facts["device"]) == (
        "first try",
        1,
        "PyTorch",
        "cpu",
    )
    assert facts["command"] == "train.py --lr 0.1 --hub-token *** --api_key=***"
    assert facts["time"].endswith("Z")
    run = str(report).partition("  run ")[2]
    assert "first try, 20" in run
    assert "PyTorch, cpu" in run
    assert "train.py --lr 0.1" in run
    assert ng.OverflowReport.from_json(report.to_json()).environment == facts


@pytest.mark.parametrize("name", ["", "a\nb", " ", 3, "x" * 201])
def test_names_that_no_report_could_show_are_refused(name):
    with pytest.raises(ng.InvalidInput, match="name must be"):
        ng.GuardConfig(name=name)
