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
            (tmp_path / "repro-step00000002-rank0" / "analysis.txt").write_text("the user's")
    assert numbers(tmp_path) == [1, 2, 4, 5]
    assert [path.name for path in (tmp_path / "repro-step00000002-rank0").iterdir()] == ["analysis.txt"]


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
