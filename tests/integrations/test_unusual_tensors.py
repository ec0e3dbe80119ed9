"""Trainer, Accelerate and Lightning with frozen integers, sparse gradients and parameters that come from elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from unusual_tensors import LowRank

import hallo_numguard as ng

pytestmark = pytest.mark.usefixtures("cpu_alone")

NAN = float("nan")
INTEGERS = "3 tensors are not checked, because they hold integers: base.codes, base.signed, base.mask"


def batch(step, bad=None):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
    if step == bad:
        x[1, 2] = NAN
    return x


def low_rank():
    torch.manual_seed(0)
    return LowRank()


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def same_weights(left, right):
    return all(torch.equal(one, other) for one, other in zip(left.parameters(), right.parameters(), strict=True))


# -- Trainer ----------------------------------------------------------------------------------------------------------


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = low_rank()

    def forward(self, x):
        return {"loss": self.net(x).square().mean()}


def trainer_of(model, folder, callbacks=(), bad=None, **settings):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    usual = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 5,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    data = [{"x": x} for step in range(1, 6) for x in batch(step, bad)]
    args = transformers.TrainingArguments(**{**usual, **settings})
    return transformers.Trainer(model=model, args=args, train_dataset=data, callbacks=list(callbacks))


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"max_grad_norm": 0.0}], ids=["fp32", "bf16", "unclipped"])
def test_a_trainer_with_frozen_integers(tmp_path, settings):
    plain, model = WithLoss(), WithLoss()
    trainer_of(plain, tmp_path, **settings).train()
    callback = ng.integrations.NumGuardCallback()
    trainer_of(model, tmp_path, [callback], **settings).train()
    assert same_weights(plain, model)
    assert [finding.message for finding in callback.findings] == [INTEGERS.replace("base", "net.base")]
    callback = ng.integrations.NumGuardCallback()
    trainer_of(model, tmp_path, [callback], bad=4, **settings).train()
    assert (callback.last_report.verdict, callback.last_report.first.name) == ("input_nonfinite", "x")
    assert callback.last_report.first.index == (1, 2)


# -- Accelerate -------------------------------------------------------------------------------------------------------


def accelerator():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    return accelerate.Accelerator(cpu=True)


def test_an_accelerator_with_frozen_integers_and_a_group_that_is_added_later():
    here, extra = accelerator(), nn.Linear(8, 8)
    model, optimizer = here.prepare(model := low_rank(), torch.optim.AdamW(trained(model)))
    guard = ng.attach(here)
    for step in range(1, 7):
        if step == 3:  # to the plain optimizer: Accelerate has no way of its own
            optimizer.optimizer.add_param_group({"params": list(extra.parameters())})
        here.backward(extra(model(batch(step, 5))).square().mean())
        here.clip_grad_norm_([*trained(model), *extra.parameters()], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert [record.applied for record in guard.history] == [True, True, True, True, False, True]
    assert guard.history[-1].parameters["param_groups[1][0]"].norm > 0
    assert guard.last_report.verdict == "input_nonfinite"
    assert {"param_groups[1][0]", "param_groups[1][1]"} <= {item.name for item in guard.last_report.offenders}
    assert [finding.message for finding in guard.findings] == [INTEGERS]
    assert all(parameter.isfinite().all() for parameter in extra.parameters())
    guard.detach()


@pytest.mark.parametrize("apart", [False, True], ids=["one optimizer", "an optimizer of their own"])
def test_learnt_loss_weights_under_accelerate(apart):
    here, weights = accelerator(), nn.Parameter(torch.zeros(2))
    model = low_rank()
    if apart:
        optimizers = [torch.optim.AdamW(trained(model)), torch.optim.SGD([weights], lr=0.1)]
    else:
        optimizers = [torch.optim.AdamW([{"params": trained(model)}, {"params": [weights]}])]
    model, *optimizers = here.prepare(model, *optimizers)
    guard = ng.attach(here)
    for step in range(1, 6):
        loss = model(batch(step)).square().mean() * torch.exp(-weights[0]) + weights.sum()
        here.backward(loss + (weights[1] * NAN if step == 4 else 0.0))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    name = "param_groups[0][0]" if apart else "param_groups[1][0]"
    assert guard.last_report.step == 4
    assert guard.last_report.offenders[0].name == name
    assert weights.isfinite().all()
    guard.detach()


class Recommender(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, 8, sparse=True)
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        return self.out(self.table(torch.tensor([1, 5, 1, 9])) + x)


def test_sparse_gradients_with_an_optimizer_of_their_own_under_accelerate():
    runs = []
    for guarded in (False, True):
        here = accelerator()
        torch.manual_seed(0)
        model = Recommender()
        dense = torch.optim.AdamW(model.out.parameters())
        sparse = torch.optim.SparseAdam(list(model.table.parameters()))
        model, dense, sparse = here.prepare(model, dense, sparse)
        guard = ng.attach(here) if guarded else None
        for step in range(1, 7):
            if step == 4 and not guarded:
                continue
            here.backward(model(batch(step, 4)).square().mean())
            here.clip_grad_norm_(model.out.parameters(), 1.0)
            for optimizer in (dense, sparse):
                optimizer.step()
                optimizer.zero_grad()
        runs.append(model)
        if guarded:
            assert guard.last_report.verdict == "input_nonfinite"
            assert guard.findings == []
            guard.detach()
    assert same_weights(*runs)


# -- Lightning --------------------------------------------------------------------------------------------------------


def test_a_lightning_module_with_frozen_integers_that_unfreezes_a_part(tmp_path):
    pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = low_rank()
            self.head = nn.Linear(8, 8).requires_grad_(False)

        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 2:
                self.head.requires_grad_(True)
                self.outside = [nn.Parameter(torch.zeros(1))]  # in a list, which hides it from the module
                self.trainer.optimizers[0].add_param_group({"params": [*self.head.parameters(), *self.outside]})

        def training_step(self, batch, batch_idx):
            loss = self.head(self.net(batch[0])).square().mean()
            return loss + self.outside[0].sum() if batch_idx >= 2 else loss

        def configure_optimizers(self):
            return torch.optim.AdamW(trained(self))

    data = torch.utils.data.DataLoader([[batch(step, 5)] for step in range(1, 7)], batch_size=None)
    callback = ng.integrations.LightningNumGuardCallback()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_steps=6,
        accelerator="cpu",
        callbacks=[callback],
        default_root_dir=tmp_path,
        **quiet,
        enable_model_summary=False,
    )
    module = Module()
    trainer.fit(module, data)
    assert [record.applied for record in callback.history] == [True, True, True, True, False, True]
    assert callback.history[-1].parameters["head.weight"].norm > 0
    assert callback.history[-1].parameters["param_groups[1][2]"].norm == 1.0
    assert callback.last_report.verdict == "input_nonfinite"
    assert [finding.message for finding in callback.findings if finding.kind == "not_checked"] == [
        INTEGERS.replace("base", "net.base")
    ]
    assert all(parameter.isfinite().all() for parameter in trained(module))


def test_saves_with_frozen_integers_pass_the_gate(tmp_path):
    callback = ng.integrations.NumGuardCallback()
    trainer = trainer_of(WithLoss(), tmp_path, [callback], save_strategy="steps", save_steps=2)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-5",
    ]
    assert callback.last_report is None
    assert [finding.kind for finding in callback.findings] == ["not_checked"]
