"""What may be saved: the rules, on a plain optimizer and the keeper of checkpoints that saves its run."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import hallo_numguard as ng
from hallo_numguard.guard.save_gate import Save

import adapter_support as support

NAN, INF = float("nan"), float("inf")


class Run:
    """A model that has what real ones have (a mask, buffers, a row that is never read), and its guarded optimizer."""

    def __init__(self, folder, damage=lambda model: None, **policy):
        self.model = support.Faulty("none", kind=support.Untied).model
        self.model.register_buffer("scratch", torch.zeros(3), persistent=False)
        with torch.no_grad():
            damage(self.model)
        self.keeper = ng.CheckpointKeeper(folder, keep=1)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        config = ng.GuardConfig(keeper=self.keeper, policy=ng.Policy(**policy))
        self.optimizer = ng.GuardedOptimizer(torch.optim.AdamW(trained, lr=1e-3), self.model, config)
        self.steps = 0

    def step(self):
        """Trains for a step in which no token 15 is read."""
        self.steps += 1
        (tokens, features), target = self.model.batch(torch.Generator().manual_seed(self.steps), torch.float32)
        loss = self.model.loss(self.model(tokens.clamp(max=14), features), target)
        self.optimizer.watch_loss(loss).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self):
        """Saves it, and returns the names of the checkpoints that there are."""
        self.keeper.save({"model": self.model, "optimizer": self.optimizer}, self.steps)
        return self.saved()

    def saved(self):
        """Returns the names of the checkpoints."""
        return sorted(path.name for path in self.keeper._store.folder.iterdir() if path.name[0] != ".")


def last_row(model):
    model.embedding.weight[15] = NAN


def test_a_finite_run_is_saved_and_nothing_is_said(tmp_path):
    run = Run(tmp_path)
    run.step()
    assert len(run.save()) == 1
    run.model.scratch.fill_(NAN)  # which no state dict has
    run.save()
    assert run.optimizer.findings == []


@pytest.mark.parametrize(
    ("damage", "kind", "name", "index", "verdict"),
    [
        (lambda run: run.model.norm.weight[3].fill_(NAN), "parameter", "norm.weight", (3,), "weights_nonfinite"),
        (lambda run: run.model.norm.weight[3].fill_(-INF), "parameter", "norm.weight", (3,), "weights_nonfinite"),
        (lambda run: run.model.projection.weight[3, 1].fill_(INF), "parameter", "projection.weight", (3, 1), None),
        (lambda run: run.model.positions[2, 1].fill_(NAN), "buffer", "positions", (2, 1), "weights_nonfinite"),
        (
            lambda run: run.optimizer.state[run.model.norm.bias]["exp_avg_sq"][5].fill_(INF),
            "optimizer_state",
            "norm.bias",
            (5,),
            "optimizer_state_nonfinite",
        ),
    ],
)
def test_what_went_bad_is_refused_and_the_last_checkpoint_stays(damage, kind, name, index, verdict, tmp_path):
    run = Run(tmp_path)
    run.step()
    before = run.save()
    with torch.no_grad():
        damage(run)
    with pytest.raises(ng.NumericsError, match=r"^CheckpointKeeper\.save was about to write") as caught:
        run.save()
    first = caught.value.report.first
    assert (first.kind, first.name, first.index) == (kind, name, index)
    assert caught.value.report.verdict == (verdict or "weights_nonfinite")
    assert run.optimizer.last_report is caught.value.report
    assert run.saved() == before
    run.optimizer.detach()
    assert run.save() != before


def test_a_buffer_that_was_replaced_is_read_as_it_is_now(tmp_path):
    run = Run(tmp_path)
    run.model.positions = torch.full_like(run.model.positions, NAN)
    with pytest.raises(ng.NumericsError):
        run.save()


def test_a_row_that_is_never_read_is_saved_and_said_once(tmp_path):
    run = Run(tmp_path, last_row)
    for _ in range(2):
        run.step()
        run.save()
    assert [finding.severity for finding in run.optimizer.findings] == ["warning", "info"]
    assert run.optimizer.findings[1].message.endswith("because it was so already when the optimizer was guarded.")
    with torch.no_grad():
        run.model.embedding.weight[14, 2] = NAN
    with pytest.raises(ng.NumericsError) as caught:
        run.save()
    assert caught.value.report.first.nan == 17
    assert "other values of it were not finite when the optimizer was guarded" in caught.value.report.evidence


def test_values_that_become_finite_are_no_fault(tmp_path):
    """Running extremes begin at infinity, and become finite one after the other."""
    run = Run(tmp_path, lambda model: model.positions[:4].fill_(INF))
    run.model.positions[0] = 1.0
    run.save()
    run.model.positions[0] = INF
    run.model.positions[5] = INF
    with pytest.raises(ng.NumericsError):
        run.save()


def test_decay_into_the_moments_of_a_row_that_is_never_read_is_no_fault(tmp_path):
    """Adam adds the decay to the gradient: the moments of that row become NaN, and of no other."""
    run = Run(tmp_path, last_row)
    run.optimizer.detach()
    adam = torch.optim.Adam([run.model.embedding.weight], lr=1e-3, weight_decay=0.1)
    run.optimizer = ng.GuardedOptimizer(adam, run.model, ng.GuardConfig(keeper=run.keeper))
    run.step()
    assert adam.state[run.model.embedding.weight]["exp_avg"].isnan().sum() == 16
    run.save()
    adam.state[run.model.embedding.weight]["exp_avg"][:8] = NAN
    with pytest.raises(ng.NumericsError):
        run.save()


def test_what_was_bad_from_the_beginning_is_refused_once_a_report_blames_it(tmp_path):
    run = Run(tmp_path, lambda model: model.norm.weight[3].fill_(NAN))
    assert len(run.save()) == 1  # before any step nobody knows whether it is read
    with pytest.raises(ng.NumericsError):
        run.step()
    with pytest.raises(ng.NumericsError) as caught:
        run.save()
    report = caught.value.report
    assert (report.step, report.first.name, report.consecutive_skips) == (1, "norm.weight", 1)
    assert report.evidence == run.optimizer.last_report.evidence
    assert str(report).startswith("CheckpointKeeper.save was about to write")


def test_a_policy_that_warns_saves(tmp_path):
    run = Run(tmp_path, on_bad_save="warn")
    run.step()
    with torch.no_grad():
        run.model.norm.weight[3] = NAN
    assert len(run.save()) == 1
    (finding,) = run.optimizer.findings
    assert (finding.severity, finding.offender.name) == ("error", "norm.weight")
    with pytest.raises(ng.InvalidInput, match="on_bad_save must be one of warn, raise"):
        ng.Policy(on_bad_save="skip")


def test_what_is_checked_already_is_not_checked_again():
    run = ng.GuardedOptimizer(torch.optim.SGD((model := nn.Linear(2, 2)).parameters(), lr=0.1), model)
    session = run._sessions()[0]
    with torch.no_grad():
        model.weight[0, 0] = NAN
    everything, weights = Save("all"), Save("weights", weights_only=True)
    for outer, inner, checks in (
        (everything, weights, False),
        (everything, everything, False),
        (weights, weights, False),
        (weights, everything, True),
    ):
        with session.save_gate.passed(outer):
            assert (session.check_save(inner) is not None) is checks
    assert session.check_save(everything) is not None


@pytest.mark.contains_failures
def test_a_check_that_fails_saves_all_the_same(tmp_path):
    run = Run(tmp_path)
    run.optimizer._sessions()[0].save_gate._read = lambda *_: 1 / 0
    with torch.no_grad():
        run.model.norm.weight[3] = NAN
    assert len(run.save()) == 1


def test_a_copy_of_a_keeper_has_no_guard(tmp_path):
    run = Run(tmp_path)
    assert len(run.keeper.save_gates) == 1
    assert pickle.loads(pickle.dumps(run.keeper)).save_gates == []
    assert len(copy.deepcopy(run.optimizer)._config.keeper.save_gates) == 2  # the same keeper, of both


def test_the_keeper_of_another_run_is_left_alone(tmp_path):
    run = Run(tmp_path)
    with torch.no_grad():
        run.model.norm.weight[3] = NAN
    run.keeper.save({"other": nn.Linear(2, 2)}, step=1)
