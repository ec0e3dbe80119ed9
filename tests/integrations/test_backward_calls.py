"""A loss that is not finite while its gradients are: told in every way of training, in the step in which it is seen."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import hallo_numguard as ng
from hallo_numguard.integrations import backward_calls

from deepspeed_support import make_engine, run_ranks

pytestmark = pytest.mark.usefixtures("cpu_alone")

NAN, INF = float("nan"), float("inf")


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 64))


def tokens(ignored=False, seed=0):
    inputs = torch.randint(0, 64, (4, 8), generator=torch.Generator().manual_seed(seed))
    return inputs, torch.full_like(inputs, -100) if ignored else inputs.clone()


def loss_of(model, inputs, labels):
    return nn.functional.cross_entropy(model(inputs).flatten(0, 1).float(), labels.flatten())


def seen(guard):
    return [(finding.kind, finding.step) for finding in guard.findings if finding.kind == "loss_nonfinite"]


def regression(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def batch(step):
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(step))


# -- plain loops -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["clear-first", "clear-before-backward", "clear-last"])
@pytest.mark.parametrize("watched", [False, True])
def test_labels_that_are_all_ignored_are_told_of_at_once(watched, order, caplog):
    model = classifier()
    optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.parameters()), model)
    for step in range(1, 6):
        if order == "clear-first":
            optimizer.zero_grad()
        loss = loss_of(model, *tokens(step in (3, 4)))
        if watched:
            optimizer.watch_loss(loss)
        if order == "clear-before-backward":
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert seen(optimizer) == [("loss_nonfinite", bad) for bad in (3, 4) if bad <= step]
        if order == "clear-last":
            optimizer.zero_grad()
    report = optimizer.last_report
    assert report.verdict == "loss_nonfinite"
    assert report.step == 4
    assert report.recoverable is None
    assert report.first.kind == "loss"
    assert report.first.nan == 1
    assert report.outcome == "applied all the same"
    assert "every gradient of the step is 0" in report.evidence
    assert "2 steps in a row with such a loss" in report.evidence
    assert optimizer.findings[0].message == "step 3: loss NaN, gradients finite (all zero): no valid label?"
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 2
    assert "nll_loss" in told[1]  # that step was watched operation by operation
    assert [math.isnan(record.loss) for record in optimizer.history] == [False, False, True, True, False]
    assert all(record.applied for record in optimizer.history)


def test_labels_that_the_model_was_called_with_are_named():
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = classifier()

        def forward(self, inputs, labels):
            return loss_of(self.body, inputs, labels)

    model = WithLoss()
    optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.parameters()), model)
    model(*tokens(True)).backward()
    optimizer.step()
    line = "labels, with which the model was called: every one of its 32 elements is -100"
    assert line in optimizer.last_report.evidence
    assert not any("label" in missing for missing in optimizer.last_report.not_checked)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_constant_that_is_not_finite_in_one_of_several_micro_batches(value):
    model = regression()
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for step in range(1, 4):
        optimizer.zero_grad()
        for part in range(3):
            loss = model(batch(part)).square().mean() / 3
            (loss + value if (step, part) == (2, 1) else loss).backward()
        optimizer.step()
    assert seen(optimizer) == [("loss_nonfinite", 2)]
    report = optimizer.last_report
    assert report.evidence[0] == "1 of 3 losses of the step are not finite: number 1, counted from 0"
    assert not any("gradient of the step is 0" in line for line in report.evidence)
    assert ("Inf" if math.isinf(value) else "NaN") in report.happened


def test_a_model_whose_output_is_not_finite_is_named_though_its_gradients_are():
    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(3, 2)

        def forward(self, state):
            action = torch.tanh(self.body(state)) * 2
            return action, torch.log(1 - action.detach().square()).sum(-1) + self.body(state).sum(-1)

    torch.manual_seed(0)
    model = Policy()
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    action, logp = model(torch.randn(32, 3) * 3)
    (logp.mean() + action.mean()).backward()
    optimizer.step()
    report = optimizer.last_report
    assert (report.verdict, report.outcome) == ("forward_nonfinite", "applied all the same")
    assert (report.first.kind, report.first.module) == ("activation", "")
    assert seen(optimizer) == [("loss_nonfinite", 1)]


def test_what_is_no_loss_of_the_step_is_not_counted():
    model, other = regression(), regression(1)
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for step in range(1, 4):
        optimizer.zero_grad()
        output = model(batch(step))
        _ = (output * NAN).mean()  # for the log alone
        with torch.no_grad():
            model(batch(step)) * NAN
        (other(batch(step)).mean() + NAN).backward()  # another model's
        output.backward(torch.ones_like(output), retain_graph=True)
        output.square().mean().backward()
        optimizer.step()
    assert seen(optimizer) == []
    assert optimizer.last_report is None


@pytest.mark.parametrize("bad", ["generator", "discriminator"])
@pytest.mark.parametrize("named", [False, True])
def test_of_two_losses_each_belongs_to_its_own_optimizer(named, bad):
    generator = regression()
    generator.add_module("last", nn.Linear(1, 4))
    discriminator = regression(1)
    models = generator, discriminator
    first, second = (
        ng.GuardedOptimizer(torch.optim.Adam(model.parameters()), list(model.named_parameters()) if named else model)
        for model in models
    )
    for step in range(1, 4):
        noise = {bad: NAN} if step == 2 else {}
        second.zero_grad()
        loss = (discriminator(generator(batch(step)).detach()) - discriminator(batch(step))).mean()
        (loss + noise.get("discriminator", 0.0)).backward()
        second.step()
        first.zero_grad()
        loss = -discriminator(generator(batch(step))).mean()
        (loss + noise.get("generator", 0.0)).backward()
        first.step()
    guilty, innocent = (first, second) if bad == "generator" else (second, first)
    assert seen(guilty) == [("loss_nonfinite", 2)]
    assert seen(innocent) == []


def test_the_graph_of_a_pass_is_searched_once_for_all_guards_that_take_no_part(monkeypatch):
    searched, leaves = [], backward_calls._leaves
    monkeypatch.setattr(
        backward_calls, "_leaves", lambda roots: map(lambda leaf: searched.append(leaf) or leaf, leaves(roots))
    )
    idle = [ng.GuardedOptimizer(torch.optim.SGD(model.parameters()), model) for model in (regression(), regression())]
    model = regression()
    model(batch(1)).square().mean().backward()
    assert len(searched) == len(list(model.parameters()))
    assert not any(optimizer._guard.session.has_losses for optimizer in idle)


@pytest.mark.parametrize("reentrant", [True, False])
def test_calls_inside_of_a_backward_pass_are_no_losses(reentrant):
    model = regression()
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    data = batch(0).requires_grad_()
    loss = checkpoint(model, data, use_reentrant=reentrant).square().mean()
    loss.backward()
    assert len(optimizer._guard.session._steps.pending.losses) == 1
    optimizer.step()
    assert optimizer.history[0].loss == pytest.approx(loss.item())


@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_the_loss_scale_is_divided_out(scale):
    model = regression()
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    expected = []
    for step in range(3):
        optimizer.zero_grad()
        loss = model(batch(step)).square().mean()
        expected.append(loss.item())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert [record.loss for record in optimizer.history] == pytest.approx(expected)


def test_a_closure():
    model = regression()
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)

    def closure():
        optimizer.zero_grad()
        loss = model(batch(0)).square().mean() + NAN
        loss.backward()
        return loss

    optimizer.step(closure)
    assert seen(optimizer) == [("loss_nonfinite", 1)]


def test_the_policy_counts_such_steps_as_it_counts_skips():
    model = classifier()
    config = ng.GuardConfig(policy=ng.Policy(max_consecutive_skips=3))
    optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.parameters()), model, config)

    def step(ignored):
        optimizer.zero_grad()
        loss_of(model, *tokens(ignored)).backward()
        optimizer.step()

    for ignored in (True, True, False, True, True):
        step(ignored)
    with pytest.raises(ng.NumericsError, match="loss_nonfinite"):
        step(True)
    assert len(optimizer.findings) == 5


@pytest.mark.parametrize("action", ["continue", "raise"])
def test_an_action_and_a_callback_of_the_user(action):
    model, reports = classifier(), []
    config = ng.GuardConfig(policy=ng.Policy(actions={ng.Verdict.LOSS_NONFINITE: action}))
    optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.parameters()), model, config, reports.append)
    loss_of(model, *tokens(True)).backward()
    if action == "raise":
        with pytest.raises(ng.NumericsError):
            optimizer.step()
    else:
        optimizer.step()
    assert [report.verdict for report in reports] == ["loss_nonfinite"]


# -- the patch ---------------------------------------------------------------------------------------------------------


def unpatched():
    """Torch's function, after guards of other tests that nobody has detached."""
    for observer in list(backward_calls._patch._observers):
        observer.stop()
    return torch.autograd.backward


@pytest.mark.parametrize("first_to_leave", [0, 1])
def test_the_patch_goes_with_the_last_guard_in_any_order(first_to_leave):
    original = unpatched()
    guards = [ng.GuardedOptimizer(torch.optim.SGD(m.parameters(), lr=0.1), m) for m in (regression(), regression(1))]
    patched = torch.autograd.backward
    assert patched is not original
    assert pickle.loads(pickle.dumps(patched)) is patched
    assert copy.deepcopy(patched) is patched
    guards.pop(first_to_leave).detach()
    assert torch.autograd.backward is patched
    guards[0].detach()
    assert torch.autograd.backward is original
    loss = regression()(batch(0)).mean()
    patched(loss)  # by whoever has kept it


def test_other_code_that_wraps_the_patch_stays():
    original = unpatched()
    model = regression()
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    ours, calls = torch.autograd.backward, []

    def wrapper(*args, **kwargs):
        calls.append(1)
        return ours(*args, **kwargs)

    torch.autograd.backward = wrapper
    try:
        optimizer.detach()
        assert torch.autograd.backward is wrapper
        again = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
        model(batch(0)).mean().backward()
        assert len(calls) == 1
        assert len(again._guard.session._steps.pending.losses) == 1
        again.detach()
    finally:
        torch.autograd.backward = original


def test_a_model_and_an_optimizer_are_pickled_and_copied_meanwhile():
    model = regression()
    optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    model(batch(0)).mean().backward()
    file = io.BytesIO()
    torch.save([model, optimizer.state_dict()], file)
    copied = copy.deepcopy(optimizer)
    optimizer.step()
    copied.detach()


def test_training_has_the_same_bits():
    results = []
    for guarded in (False, True):
        model = regression()
        optimizer = torch.optim.Adam(model.parameters())
        if guarded:
            optimizer = ng.GuardedOptimizer(optimizer, model)
        for step in range(6):
            optimizer.zero_grad()
            loss = model(batch(step)).square().mean()
            (loss + NAN if step == 3 else loss).backward()
            optimizer.step()
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_what_is_compiled_is_not_divided_further():
    pieces = []

    def backend(graph, _):
        pieces.append(graph)
        return graph.forward

    counts = []
    for guarded in (False, True):
        torch._dynamo.reset()
        pieces.clear()
        model = regression()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        # Names alone: hooks on a model would divide what is compiled around its call.
        guard = ng.GuardedOptimizer(optimizer, model.named_parameters()) if guarded else None

        @torch.compile(backend=backend)
        def step(data, model=model):
            loss = model(data).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            return loss * 2

        for number in range(3):
            step(batch(number))
        if guard is not None:
            assert len(guard._guard.session._steps.pending.losses) == 3
        counts.append(len(pieces))
    assert counts[0] == counts[1] > 0


# -- frameworks --------------------------------------------------------------------------------------------------------


def test_accelerate_with_two_optimizers():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    models = [regression(), regression(1)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    *models, first, second = accelerator.prepare(*models, *optimizers)
    guard = ng.attach(accelerator)
    for step in range(8):
        with accelerator.accumulate(*models):
            for model, optimizer in zip(models, (first, second), strict=True):
                loss = model(batch(step)).square().mean()
                accelerator.backward(loss + NAN if step == 3 and model is models[1] else loss)
                optimizer.step()
                optimizer.zero_grad()
    sessions = guard._sessions()
    assert [[(found.kind, found.step) for found in session.findings] for session in sessions] == [
        [],
        [("loss_nonfinite", 2)],
    ]


def test_a_trainer(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = classifier()

        def forward(self, input_ids, labels):
            logits = self.body(input_ids)
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    def item(place):
        inputs, labels = tokens(ignored=place in (4, 5), seed=place)
        return {"input_ids": inputs[0], "labels": labels[0]}

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no"
    )
    trainer = InOrder(Model(), arguments, train_dataset=[item(place) for place in range(8)])
    guard = ng.attach(trainer)
    trainer.train()
    assert seen(guard) == [("loss_nonfinite", 3)]
    assert guard.last_report.verdict == "loss_nonfinite"
    assert any("labels" in line and "-100" in line for line in guard.last_report.evidence)
    assert list((tmp_path / "numguard").glob("*step00000003*"))


@pytest.mark.parametrize("automatic", [True, False])
def test_lightning(automatic):
    pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = classifier()
            self.automatic_optimization = automatic

        def training_step(self, batch, _):
            loss = loss_of(self.net, *(part[0] for part in batch))
            if automatic:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = [tokens(step == 3, step) for step in range(1, 6)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        guard = ng.attach(trainer)
        trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=1))
    assert seen(guard) == [("loss_nonfinite", 3)]
    assert guard.last_report.verdict == "loss_nonfinite"


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("way", ["engine", "by-hand"])
def test_an_engine_of_deepspeed(stage, way):
    engine = make_engine("bf16", stage=stage, model=classifier())
    if way == "by-hand" and (stage == 0 or not hasattr(engine, "scale")):
        pytest.skip("DeepSpeed has no backward pass by hand here")
    guard = ng.attach(engine)
    for step in range(1, 6):
        loss = loss_of(engine, *tokens(step in (2, 3)))
        if way == "engine":
            engine.backward(loss)
        else:
            loss.backward()
        engine.step()
    assert seen(guard) == [("loss_nonfinite", 2), ("loss_nonfinite", 3)]
    assert guard.last_report.verdict == "loss_nonfinite"
    assert guard.last_report.step == 3
    guard.detach()


RANKS = """
import logging
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import hallo_numguard as ng

logging.disable(logging.CRITICAL)
dist.init_process_group("gloo")
RANK = dist.get_rank()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
wrapped = DistributedDataParallel(model)
config = ng.GuardConfig(policy=ng.Policy(max_consecutive_skips=2))
optimizer = ng.GuardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), wrapped, config)
for step in range(1, 9):
    optimizer.zero_grad()
    loss = wrapped(torch.randn(8, 4)).square().mean()
    if RANK == 1 and 2 <= step <= 6:
        loss = loss + float("nan")
    if step == 7:
        loss = loss * float("nan")
    loss.backward()
    optimizer.step()
kinds = [finding.kind for finding in optimizer.findings]
assert kinds == ([] if RANK == 0 else ["loss_nonfinite"] * 5), kinds
assert optimizer.last_report.step == 7
assert [record.applied for record in optimizer.history] == [True] * 6 + [False, True]
weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
other = weights.clone()
dist.broadcast(other, 0)
assert torch.equal(weights, other)
"""


def test_a_loss_of_one_rank_stops_no_other(tmp_path):
    run_ranks(RANKS, tmp_path)


ENGINES = """
import logging
import torch
from torch import nn
import deepspeed_support as support
import hallo_numguard as ng

logging.disable(logging.CRITICAL)
torch.manual_seed(0)
config = ng.GuardConfig(policy=ng.Policy(max_consecutive_skips=2))
engine = support.make_engine("fp16", stage=STAGE, model=nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 64)))
guard = ng.attach(engine, config)
rank = torch.distributed.get_rank()
for step in range(1, 7):
    inputs = torch.randint(0, 64, (4, 8))
    labels = torch.full_like(inputs, -100) if rank == 1 and 2 <= step <= 5 else inputs
    loss = nn.functional.cross_entropy(engine(inputs).flatten(0, 1).float(), labels.flatten())
    engine.backward(loss)
    engine.step()
found = [finding.step for finding in guard.findings if finding.kind == "loss_nonfinite"]
assert found == ([] if rank == 0 else [2, 3, 4, 5]), found
assert (guard.last_report is None) == (rank == 0)
assert engine.skipped_steps == 0
guard.detach()
"""


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_loss_of_one_rank_of_an_engine(stage, tmp_path):
    run_ranks(ENGINES.replace("STAGE", str(stage)), tmp_path)
