"""Figures and reports in trackers that a run has: real engines, and real files of each tracker, read back."""

from __future__ import annotations

import csv
import logging
import math
import struct
import sys
import threading
import time
from pathlib import Path

import pytest

import hallo_numguard as ng
from hallo_numguard.trackers.background import MAX_WAITING
from hallo_numguard.trackers.base import FIGURES
from hallo_numguard.trackers.mlflow import MlflowSink

import deepspeed_support as support

BAD = 3  # step in which what a module returns is not finite
COLUMNS = [f"numguard/{name}" for name in ("gradient_norm", "gradient_nonfinite", "skipped_in_a_row")]


@pytest.fixture
def train():
    """Six steps of an engine, the third of them bad; returns the guard."""
    guards = []

    def run(*sinks, steps=6, **config):
        engine = support.make_engine("fp16", scale_power=8, **config)
        guard = ng.attach(engine, ng.GuardConfig(sinks=list(sinks)))
        guards.append(guard)
        ng.inject(engine, "activation", "hidden", step=BAD)
        for step in range(steps):
            support.train_step(engine, step)
        assert guard.last_report.first.name == "hidden"
        return guard

    yield run
    for guard in guards:
        guard.detach()


def expected(guard):
    """Norm, non-finite count and skips by step, as the flight recorder has them."""
    rows = [(row.norm / row.loss_scale, row.nonfinite, int(not row.applied)) for row in guard.history]
    assert [skipped for *_, skipped in rows] == [0, 0, 1, 0, 0, 0]
    assert rows[BAD - 1][1] > 0
    return rows


def test_a_summary_writer(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path))
    writer.add_scalar("loss", 1.0, 1)
    guard = train(writer)
    writer.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    series = {f"numguard/{name}" for name in FIGURES}
    assert set(events.Tags()["scalars"]) == series | {"loss"}
    columns = [{event.step: event.value for event in events.Scalars(name)} for name in COLUMNS]
    for step, row in enumerate(expected(guard), start=1):
        assert [column[step] for column in columns] == pytest.approx(row, rel=1e-6, nan_ok=True)
    assert math.isnan({event.step: event.value for event in events.Scalars("numguard/loss")}[BAD])
    (text,) = events.Tensors("numguard/report/text_summary")
    assert text.step == BAD
    assert "forward_nonfinite" in text.tensor_proto.string_val[0].decode()


def wandb_records(path: Path):
    """Reads a run's file: 32 KiB blocks of pieces (checksum, length, kind) after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for the head of a piece
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if at + 7 + length > len(data):
            return
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def finished(folder: Path):
    """Waits until the run's file is whole, which it need not be when wandb.finish() returns."""
    (path,) = folder.rglob("run-*.wandb")
    for _ in range(600):
        records = list(wandb_records(path))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.05)
    raise AssertionError("the run's file has no end")


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """W&B without a network, and no run that another test left."""
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    import wandb

    assert wandb.run is None
    yield wandb
    wandb.finish()


def test_the_active_run_of_wandb(train, wandb, tmp_path):
    """The run's own rows are where they would be without us; ours are in them."""
    settings = wandb.Settings(console="off", x_disable_stats=True)
    run = wandb.init(project="test", mode="offline", dir=str(tmp_path), settings=settings)

    class LogsItself:
        def write(self, step, figures):
            run.log({"loss": figures["loss"]}, step=10 * step)

        def report(self, report):
            pass

    guard = train("wandb", LogsItself())
    wandb.finish()
    records = finished(tmp_path)
    rows = [
        {"/".join(item.nested_key) or item.key: float(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    ours = {row["numguard/step"]: row for row in rows if "numguard/step" in row}
    for step, row in enumerate(expected(guard), start=1):
        assert [ours[step][name] for name in COLUMNS] == pytest.approx(row, rel=1e-6, nan_ok=True)
    assert [row["_step"] for row in rows if "loss" in row] == [10, 20, 30, 40, 50, 60], "nothing was dropped"
    summary = [
        item.value_json
        for record in records
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
        if "numguard/report" in (item.key, *item.nested_key)
    ]
    assert any("forward_nonfinite" in text for text in summary)
    alerts = [record.alert for record in records if record.WhichOneof("record_type") == "alert"]
    assert [alert.title[:6] for alert in alerts] == ["step 3"]


@pytest.fixture
def mlflow(monkeypatch, tmp_path):
    """MLflow on a database of this test's own."""
    monkeypatch.setenv("GIT_PYTHON_REFRESH", "quiet")
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.create_experiment("test", artifact_location=str(tmp_path / "artifacts"))
    mlflow.set_experiment("test")
    yield mlflow
    mlflow.end_run()
    mlflow.set_tracking_uri(before)


def test_the_active_run_of_mlflow(train, mlflow, tmp_path):
    run = mlflow.start_run()
    guard = train("mlflow")
    mlflow.end_run()
    mlflow.flush_async_logging()
    client = mlflow.MlflowClient()
    columns = [
        {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)} for name in COLUMNS
    ]
    for step, row in enumerate(expected(guard), start=1):
        assert [column[step] for column in columns] == pytest.approx(row, rel=1e-6, nan_ok=True)
    (text,) = (tmp_path / "artifacts").rglob("overflow-step*.txt")
    assert text.name == "overflow-step00000003.txt"
    assert "forward_nonfinite" in text.read_text()


def test_a_server_of_mlflow_that_does_not_answer_costs_training_nothing(mlflow, monkeypatch, caplog):
    run, server = mlflow.start_run(), threading.Event()
    sent = []

    class OnItsWay:
        wait = server.wait

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", lambda *_, **figures: sent.append(figures) or OnItsWay)
    sink = MlflowSink()
    for step in range(1, 101):
        sink.write(step, {"loss": 1.0})
    assert MAX_WAITING <= len(sent) <= MAX_WAITING + 1
    server.set()
    sink.close()
    assert f"MLflow was too slow: {100 - len(sent)} deliveries were dropped" in caplog.text
    assert mlflow.active_run() is run


def test_no_active_run_is_told_once_and_none_is_started(train, wandb, mlflow, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "hallo_numguard"):
        guard = train("wandb", "mlflow", f"csv:{tmp_path}/figures.csv")
    told = [record.getMessage() for record in caplog.records if "no more figures" in record.getMessage()]
    assert [message.split()[0] for message in told] == ["WandbSink", "MlflowSink"]
    assert "call wandb.init()" in told[0]
    assert "call mlflow.start_run()" in told[1]
    assert wandb.run is None
    assert mlflow.active_run() is None
    assert mlflow.MlflowClient().search_runs(["1"]) == []
    assert len((tmp_path / "figures.csv").read_text().splitlines()) == 7
    assert len(guard.history) == 6


def test_a_table_that_a_resumed_run_continues(train, tmp_path):
    path = tmp_path / "logs" / "figures.csv"
    for run in range(2):
        guard = train(f"csv:{path}")
        guard.detach()
        with path.open() as file:
            rows = list(csv.DictReader(file))
        assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6] * (run + 1)
        for row, (norm, nonfinite, skipped) in zip(rows[-6:], expected(guard), strict=True):
            assert float(row["gradient_norm"]) == pytest.approx(norm, nan_ok=True)
            assert (int(row["gradient_nonfinite"]), int(row["skipped_in_a_row"])) == (nonfinite, skipped)
    assert set(rows[0]) == {"step", *FIGURES}
    assert (tmp_path / "logs" / "figures.csv.txt").read_text().count("forward_nonfinite") == 2


def test_a_file_of_the_user_is_not_written_into(train, tmp_path, caplog):
    path = tmp_path / "losses.csv"
    path.write_text("step,loss\n1,0.5\n")
    train(f"csv:{path}")
    assert path.read_text() == "step,loss\n1,0.5\n"
    assert "no table of these figures" in caplog.text


def test_the_step_that_ends_the_run_is_written(tmp_path):
    engine = support.make_engine("fp16", scale_power=8)
    ng.attach(engine, ng.GuardConfig(sinks=[f"csv:{tmp_path}/figures.csv"]))
    ng.inject(engine, "parameter", "norm.weight", step=2)
    support.train_step(engine, 0)
    with pytest.raises(ng.NumericsError):
        support.train_step(engine, 1)
    last = (tmp_path / "figures.csv").read_text().splitlines()[-1]
    assert last.startswith("2,nan,256")
    assert "weights_nonfinite" in (tmp_path / "figures.csv.txt").read_text()


class Broken:
    def __init__(self):
        self.calls = 0

    def write(self, step, figures):
        self.calls += 1
        raise ConnectionError("the server is gone")

    def report(self, report):
        raise ConnectionError("the server is gone")


def test_a_sink_that_fails_is_dropped_and_training_goes_on(train, tmp_path, caplog):
    broken = Broken()
    with_it = expected(train(broken, f"csv:{tmp_path}/figures.csv"))
    assert broken.calls == 1
    told = [record for record in caplog.records if "Broken gets no more figures" in record.getMessage()]
    assert len(told) == 1
    assert "the server is gone" in told[0].getMessage()
    assert len((tmp_path / "figures.csv").read_text().splitlines()) == 7
    assert repr(with_it) == repr(expected(train())), "NaN is not equal to itself"


def test_what_is_no_sink_is_refused_before_training():
    engine = support.make_engine("fp16")
    for item, message in {
        "tensorbord": "known are csv, mlflow, wandb",
        "tensorboard": "give the SummaryWriter",
        "csv": "expected the path of a file",
        "wandb:project": "the active run is used",
        3: "expected a Sink, a SummaryWriter or the name",
    }.items():
        with pytest.raises(ng.InvalidInput, match=message):
            ng.attach(engine, ng.GuardConfig(sinks=[item]))
    with pytest.raises(ng.InvalidInput, match="sinks must be a list"):
        ng.GuardConfig(sinks="wandb")


def test_another_package_offers_a_sink(train, tmp_path, monkeypatch):
    (tmp_path / "their_tracker.py").write_text(
        "class Their:\n"
        "    rows = []\n"
        "    def __init__(self, argument): self.argument = argument\n"
        "    def write(self, step, figures): self.rows.append((self.argument, step))\n"
        "    def report(self, report): self.rows.append(('report', report.step))\n"
    )
    metadata = tmp_path / "their_tracker-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: their-tracker\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[hallo_numguard.sinks]\ntheir = their_tracker:Their\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    train("their:here")
    rows = sys.modules["their_tracker"].Their.rows
    assert rows == [("here", 1), ("here", 2), ("report", 3), *[("here", step) for step in range(3, 7)]]


RANKS = """
import sys
import deepspeed_support as support
import hallo_numguard as ng
engine = support.make_engine("fp16", stage=2)
guard = ng.attach(engine, ng.GuardConfig(sinks=["csv:PATH"]))
ng.inject(engine, "activation", "hidden", step=2)
for step in range(4):
    support.train_step(engine, step)
"""


def test_one_rank_of_two_writes(tmp_path):
    support.run_ranks(RANKS.replace("PATH", str(tmp_path / "figures.csv")), tmp_path)
    lines = (tmp_path / "figures.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "1", "2", "3", "4"]
    assert (tmp_path / "figures.csv.txt").read_text().count("Step 2 was skipped") == 1
