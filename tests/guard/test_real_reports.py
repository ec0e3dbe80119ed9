"""Public reports of training that became NaN or Inf, rebuilt from the cause that their threads name.

Each is the smallest script with the same cause. Its clean twin does what mended it, or lacks what caused it, and the
guard is silent about that.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional

import hallo_numguard as ng

from deepspeed_support import run_ranks

pytestmark = pytest.mark.usefixtures("cpu_alone")


def train(model, optimizer, loss_of, steps=4, scaler=None, autocast=None, clip_norm=None):
    """Trains with plain PyTorch; `loss_of(model, step)` makes the loss. Returns the guarded optimizer."""
    guarded = ng.GuardedOptimizer(optimizer, model, clip_norm=clip_norm)
    with contextlib.suppress(ng.NumericsError):
        for step in range(1, steps + 1):
            guarded.zero_grad()
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                loss = loss_of(model, step)
            if scaler is None:
                loss.backward()
                guarded.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(guarded)
                scaler.update()
    return guarded


def train_with_accelerate(model, optimizer, loss_of, steps=4):
    """Trains with Accelerate. Returns the guard."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    guard = ng.attach(accelerator)
    for step in range(1, steps + 1):
        accelerator.backward(loss_of(model, step))
        optimizer.step()
        optimizer.zero_grad()
    guard.detach()
    return guard


def assert_silent(guard):
    assert guard.last_report is None
    assert not guard.findings
    assert all(record.applied for record in guard.history)


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def mlp(features=4, outputs=4):
    return nn.Sequential(nn.Linear(features, 8), nn.ReLU(), nn.Linear(8, outputs))


class RowNormalised(torch.optim.Optimizer):
    """Momentum whose rows are brought to one length, and the whole back to the length that it had."""

    def __init__(self, parameters, floor):
        super().__init__(parameters, {"lr": 0.01})
        self.floor = floor

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in (weight for weight in group["params"] if weight.ndim > 1):
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.mul_(0.9).add_(weight.grad)
                rows = momentum / momentum.norm(dim=1, keepdim=True).clamp_min(1e-8)
                weight.sub_(rows * (momentum.norm() / rows.norm().clamp_min(self.floor)), alpha=group["lr"])


class Residual(nn.Module):
    """A block whose last layer begins at zero, so that the first gradient of the layer before it is zero."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def test_an_optimizer_that_divides_by_the_norm_of_a_zero_gradient():
    """microsoft/dion #24: NaN where a weight's gradient is zero, as before a layer that begins at zero."""
    x = torch.randn(16, 4)

    def loss_of(model, _):
        return functional.mse_loss(model(x), x.roll(1, 0))

    def guard(floor):
        model = Residual()
        return train(model, RowNormalised(model.parameters(), floor), loss_of)

    assert_silent(guard(1e-8))
    report = guard(0.0).last_report
    assert (report.step, report.verdict, report.first.name) == (1, ng.Verdict.UPDATE_NONFINITE, "up.weight")
    assert "at the first bad element, after the update: gradient 0, momentum 0" in report.evidence
    assert "a norm of a weight or gradient that is 0" in report.advice


def test_adam_on_float16_weights():
    """pytorch/pytorch #8860: in float16 the default eps of Adam is 0, and so is a small second moment."""
    x, y = torch.randn(16, 4).half(), torch.randn(16, 4).half()

    def guard(eps):
        model = mlp().half()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=eps)
        return train(model, optimizer, lambda model, _: 1e-2 * (model(x) - y).square().mean())

    assert_silent(guard(1e-4))
    report = guard(1e-8).last_report
    assert (report.step, report.verdict) == (1, ng.Verdict.UPDATE_NONFINITE)
    assert "eps=1e-08 is 0 in float16" in report.happened + report.summary
    assert "an eps that float16 holds" in report.advice


RANK = """
import os, torch, hallo_numguard as ng
from torch import nn
rank = int(os.environ["RANK"])
torch.distributed.init_process_group("gloo")
torch.manual_seed(0)
model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16)))
optimizer = ng.GuardedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model)
draw = torch.Generator().manual_seed(rank)
for step in range(1, 5):
    ids = torch.randint(0, 16, (2, 6), generator=draw)
    labels = ids.roll(-1, 1).clone()
    if rank == 1 and step in (2, 3):
        labels[:] = -100
    count = (labels != -100).sum().clamp_min(LEAST)
    optimizer.zero_grad()
    total = nn.functional.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="sum")
    (total / count).backward()
    optimizer.step()
    said = optimizer.last_report
    if said is not None and said.step == step:
        print("SAID", said.step, said.verdict, said.happened, said.advice, flush=True)
torch.distributed.destroy_process_group()
"""


def test_one_rank_without_a_valid_label(tmp_path):
    """allenai/OLMo-core #657: all labels of a rank are ignored, and a sum is divided by their number."""
    assert "SAID" not in "".join(run_ranks(RANK.replace("LEAST", "1"), tmp_path))
    said = [line for line in "".join(run_ranks(RANK.replace("LEAST", "0"), tmp_path)).splitlines() if "SAID" in line]
    first = next(line for line in said if line.startswith("SAID 2 loss_nonfinite"))
    assert "a loss that is NaN on rank 1" in first
    assert "No valid label in its batch?" in first
    second = next(line for line in said if line.startswith("SAID 3 loss_nonfinite"))
    assert "made NaN in div: 0 was divided by 0" in second
    assert "y.clamp_min(1) of what counts labels" in second


def ciou(box, truth, least):
    width, height = box[:, 2] - box[:, 0], (box[:, 3] - box[:, 1]).clamp_min(least)
    true_width, true_height = truth[2] - truth[0], truth[3] - truth[1]
    corners = torch.maximum(box[:, :2], truth[:2]), torch.minimum(box[:, 2:], truth[2:])
    common = (corners[1] - corners[0]).clamp_min(0).prod(1)
    overlap = common / (width * height + true_width * true_height - common)
    shape = (torch.atan(true_width / true_height) - torch.atan(width / height)).square()
    return (1 - overlap + shape)[overlap > 0].mean()


def test_a_box_without_height():
    """Zzh-tju/DIoU-pytorch-detectron #19: width / height of a box that a mask leaves out of the loss afterwards."""
    x, truth = torch.randn(8, 4), torch.tensor([10.0, 10.0, 20.0, 30.0])

    def guard(least):
        def loss_of(model, step):
            anchors = torch.tensor([5.0, 5.0, 15.0, 25.0]).repeat(8, 1)
            if step in (2, 3):
                anchors[3] = torch.tensor([200.0, 599.0, 300.0, 599.0])
            return ciou(anchors + model(x)[:, [0, 1, 2, 1]], truth, least)

        model = mlp()
        return train(model, torch.optim.SGD(model.parameters(), lr=1e-3), loss_of)

    assert_silent(guard(1e-3))
    report = guard(float("-inf")).last_report
    assert (report.step, report.verdict) == (3, ng.Verdict.LOSS_NONFINITE)
    assert "in ciou: shape = (torch.atan(" in report.summary
    assert "made Inf in div, sample 3: " in report.summary
    assert report.summary.endswith(" was divided by 0")
    assert any("made finite afterwards by aten.atan.default" in line for line in report.evidence)


def test_log_odds_of_a_certain_answer():
    """hpcaitech/ColossalAI #6407: log(1 - exp(logp)) where the model is certain of the chosen answer."""
    certain, other = torch.full((2, 5), 3), torch.randint(0, 3, (2, 5))

    def guard(largest):
        model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8))
        nn.init.constant_(model[1].bias[3:4], 30.0)

        def loss_of(model, step):
            def logp(ids):
                return model(ids).log_softmax(-1).gather(-1, ids[..., None]).mean((1, 2)).clamp(max=largest)

            chosen, rejected = logp(certain if step > 1 else other), logp(other.flip(1))
            odds = chosen - rejected - (torch.log(1 - chosen.exp()) - torch.log(1 - rejected.exp()))
            return -functional.logsigmoid(odds).mean() - chosen.mean()

        return train_with_accelerate(model, torch.optim.AdamW(model.parameters(), lr=1e-4), loss_of)

    assert_silent(guard(-1e-6))
    report = guard(float("inf")).last_report
    assert report.verdict is ng.Verdict.LOSS_NONFINITE
    assert "made Inf in log, sample 0: the logarithm of 0" in report.summary
    assert "log1p" in report.advice


class TableVae(nn.Module):
    """A variational autoencoder of the rows of a table."""

    def __init__(self, largest):
        super().__init__()
        self.largest = largest
        self.encoder, self.decoder = nn.Linear(6, 8), nn.Linear(4, 6)

    def forward(self, x):
        mean, logvar = self.encoder(x).chunk(2, -1)
        logvar = logvar.clamp(-30, self.largest)
        spread = torch.exp(0.5 * logvar)
        return self.decoder(mean + torch.randn_like(mean) * spread), mean, logvar


def test_an_unbounded_log_variance():
    """vanderschaarlab/synthcity #331: exp of the log variance of an encoder that is given a row of large numbers."""
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    rows = torch.randn(16, 6)
    rows[9] *= 2000
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows), batch_size=4)

    class Module(lightning.LightningModule):
        def __init__(self, largest):
            super().__init__()
            self.vae = TableVae(largest)

        def training_step(self, batch, _):
            made, mean, logvar = self.vae(batch[0])
            return functional.mse_loss(made, batch[0]) - 0.5 * (1 + logvar - mean.square() - logvar.exp()).mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    def guard(largest):
        torch.manual_seed(0)
        quiet = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "barebones"), False
        )
        callback = ng.integrations.LightningNumGuardCallback()
        trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], **quiet)
        trainer.fit(Module(largest), loader)
        return callback

    assert guard(20.0).last_report is None
    report = guard(float("inf")).last_report
    assert (report.step, report.verdict, report.first.sample) == (3, ng.Verdict.FORWARD_NONFINITE, 1)
    assert report.summary.startswith("vae made Inf in exp, sample 1: exp of ")
    assert "spread = torch.exp(0.5 * logvar)" in report.first.line


def test_the_logarithm_of_a_depth_that_was_not_measured():
    """zhengqili/MegaDepth #38: the logarithm of a target that is 0, which a product with a mask does not take away."""
    x = torch.randn(8, 4)

    def guard(least):
        def loss_of(model, step):
            depth = torch.rand(8, 6) + 0.5
            depth[5, 2] *= step not in (2, 3)
            mask, target = (depth > 0).float(), depth.clamp_min(least).log()
            difference = (model(x) - target) * mask
            return difference.square().sum() / mask.sum() - 0.5 * (difference.sum() / mask.sum()).square()

        model = mlp(outputs=6)
        return train(model, torch.optim.SGD(model.parameters(), lr=1e-2), loss_of)

    assert_silent(guard(1e-6))
    report = guard(0.0).last_report
    assert (report.step, report.recoverable) == (3, None)
    assert "a tensor made before the model was called holds 1 -Inf, sample 5, used in " in report.summary
    assert "difference = (model(x) - target) * mask" in report.summary
    assert (report.first.index, report.first.neg_inf) == ((5, 2), 1)
    assert "the logarithm of 0" in report.advice


class OwnNorm(nn.Module):
    """A batch norm that is written by hand."""

    def __init__(self, correction):
        super().__init__()
        self.correction = correction
        self.gain = nn.Parameter(torch.ones(8))
        self.register_buffer("running_var", torch.ones(8))

    def forward(self, x):
        variance = x.var(0, correction=self.correction)
        with torch.no_grad():
            self.running_var.lerp_(variance, 0.1)
        return self.gain * (x - x.mean(0)) / (variance + 1e-5).sqrt()


def test_a_batch_norm_of_one_sample():
    """karpathy/makemore #22: the unbiased variance of the last batch, which holds one sample."""
    data, labels = torch.randn(9, 4), torch.randint(0, 3, (9,))

    def guard(correction):
        def loss_of(model, step):
            part = slice((step - 1) % 3 * 4, (step - 1) % 3 * 4 + 4)
            return functional.cross_entropy(model(data[part]), labels[part])

        model = nn.Sequential(nn.Linear(4, 8), OwnNorm(correction), nn.Tanh(), nn.Linear(8, 3))
        return train(model, torch.optim.SGD(model.parameters(), lr=1e-2), loss_of, steps=5)

    assert_silent(guard(0))
    found = guard(1)
    report = found.last_report
    assert (report.step, report.verdict) == (3, ng.Verdict.FORWARD_NONFINITE)
    assert report.summary == "1 made NaN in var: it was taken of 1 value each"
    assert "drop_last" in report.advice
    assert found.model[1].running_var.isfinite().all()  # put back


class Recordings(torch.utils.data.Dataset):
    """Recordings brought to one loudness; number 6 is silent."""

    def __init__(self, least):
        self.least = least

    def __len__(self):
        return 16

    def __getitem__(self, at):
        sound = torch.randn(32, generator=torch.Generator().manual_seed(at)) * (at != 6)
        return sound * (32 / sound.square().sum().clamp_min(self.least)).sqrt(), torch.ones(32)


def test_a_silent_recording():
    """yxlu-0102/MP-SENet #33: a silent recording is divided by its loudness, in the data set."""

    def guard(least):
        batches = list(torch.utils.data.DataLoader(Recordings(least), batch_size=4))
        model = mlp(32, 32)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        return train(
            model, optimizer, lambda model, step: functional.l1_loss(model(batches[step - 1][0]), batches[0][1])
        )

    assert_silent(guard(1e-8))
    report = guard(0.0).last_report
    assert (report.step, report.verdict, report.first.index) == (2, ng.Verdict.INPUT_NONFINITE, (2, 0))
    assert "1 of its 4 samples is not finite" in report.evidence
    assert "how it was read and normalised" in report.advice


def test_two_equal_sentences_in_a_triplet():
    """huggingface/sentence-transformers #4033: the root of a distance of 0, whose loss is finite."""

    def guard(eps):
        draw = torch.Generator().manual_seed(0)

        def euclidean(left, right):
            return ((left - right).square().sum(1) + eps).sqrt()

        def loss_of(model, step):
            anchor, positive, negative = torch.randint(0, 50, (3, 6, 5), generator=draw)
            if step > 2:
                positive[4] = anchor[4]
            far = euclidean(model(anchor), model(negative))
            return functional.relu(euclidean(model(anchor), model(positive)) - far + 5).mean()

        model = nn.Sequential(nn.EmbeddingBag(50, 8), nn.Linear(8, 8))
        return train_with_accelerate(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loss_of)

    assert_silent(guard(1e-12))
    report = guard(0.0).last_report
    assert (report.step, report.verdict) == (4, ng.Verdict.BACKWARD_NONFINITE)
    assert "in euclidean: return ((left - right)" in report.summary
    assert "made Inf in the backward pass of sqrt, sample 4: " in report.summary
    assert "sqrt(x + eps)" in report.advice


def test_weights_of_classes_that_do_not_occur():
    """webis-de/small-text #39: balanced weights of classes, of which all but one have no sample: 0 / 0."""
    x, labels = torch.randn(8, 4), torch.eye(3)[torch.zeros(8, dtype=torch.long)]

    def guard(least):
        counts = labels.sum(0)
        loss = nn.BCEWithLogitsLoss(weight=counts / counts.clamp_min(least))
        model = nn.Linear(4, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return train(model, optimizer, lambda model, _: loss(model(x), labels), clip_norm=1.0)

    assert_silent(guard(1.0))
    report = guard(0.0).last_report
    assert report.recoverable is None
    assert "a tensor made before the model was called holds 2 NaN, used in " in report.summary
    assert report.first.index == (1,)
    assert "as weights of classes" in report.advice


def test_t5_in_float16():
    """huggingface/transformers #5651: the second matrix product of a feed-forward layer leaves float16."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    ids, labels = torch.randint(1, 64, (2, 6)), torch.randint(1, 64, (2, 4))

    def guard(factor):
        torch.manual_seed(0)
        model = transformers.T5ForConditionalGeneration(config)
        with torch.no_grad():
            model.encoder.block[1].layer[1].DenseReluDense.wo.weight.mul_(factor)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        return train(model, optimizer, loss(ids, labels), steps=2, scaler=scaler, autocast=torch.float16)

    def loss(ids, labels):
        return lambda model, _: model(input_ids=ids, labels=labels).loss

    assert_silent(guard(100.0))
    report = guard(8e4).last_report
    assert report.verdict is ng.Verdict.FORWARD_NONFINITE
    assert report.summary.startswith("encoder.block.1.layer.1.DenseReluDense.wo made Inf in a matrix product: ")
    assert "modeling_t5.py" in report.first.line
    assert "bfloat16 or float32" in report.advice
    assert "The loss scale has no part in it." in report.advice


def test_weight_norm_of_a_row_of_zeros():
    """google/flax #1671: weight norm divides a row of zeros by its norm."""
    x, y = torch.randn(8, 4), torch.randn(8, 3)

    def guard(row):
        layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 8))
        with torch.no_grad():
            layer.parametrizations.weight.original1[2] = row
        model = nn.Sequential(layer, nn.ReLU(), nn.Linear(8, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        return train(model, optimizer, lambda model, _: functional.mse_loss(model(x), y))

    assert_silent(guard(0.1))
    report = guard(0.0).last_report
    assert report.verdict is ng.Verdict.FORWARD_NONFINITE
    assert report.summary == ("0.parametrizations.weight.0 made NaN in weight_norm: [2, :] of the weight has norm 0")
    assert report.first.sample is None  # a row of the weight is no sample
    assert report.first.line is None  # nor is the line that called the optimizer's step where it was made
    assert "pruned" in report.advice
