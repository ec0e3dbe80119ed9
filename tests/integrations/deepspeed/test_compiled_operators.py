"""The optimizers that DeepSpeed compiles, and NVMe: the same faults are named as with torch's optimizers in memory.

`make deepspeed-ops-test` builds the operators, with DS_ACCELERATOR=cuda those of a GPU; without them these tests are
skipped.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import pytest
import torch

import hallo_numguard as ng

import deepspeed_support as support
import operators
from campaign.cases import Case, problems

pytestmark = pytest.mark.deepspeed

FAULTS = ("none", "weight", "optimizer_state", "input", "gradient")
ADAM = MappingProxyType({"type": "AdamW", "params": {"lr": 1e-3}})
LION = MappingProxyType({"type": "Lion", "params": {"lr": 1e-4}})
LAMB = MappingProxyType({"type": "Lamb", "params": {"lr": 1e-3}})
ADAGRAD = MappingProxyType({"type": "Adagrad", "params": {"lr": 1e-3}})


@pytest.fixture(autouse=True)
def half_precision_on_the_cpu():
    support.single_process_environment()
    support.allow_fp16()


def run(case, optimizer, **config):
    """Returns what was seen of a case; the optimizer is made by DeepSpeed's configuration."""
    from campaign import worker  # which asks for the rank

    seen = worker.run(case, optimizer_of=lambda _: None, optimizer=dict(optimizer), **config)
    assert seen.alone in (None, "runs")
    return seen


def found(fault, setup, stage, optimizer, offload=False, **config):
    """Returns what is wrong with what was seen of a fault."""
    case = Case(fault, "transformer", setup, stage, offload, 1)
    return problems(case, [run(case, optimizer, **config)])


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("setup", "stage"), [("fp16", 1), ("bf16", 2), ("fp16", 2), ("bf16", 3), ("fp16", 3)])
def test_cpu_adam(setup, stage, fault):
    operators.require("cpu_adam")
    assert found(fault, setup, stage, ADAM, offload=True) == []


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("setup", "stage"), [("bf16", 2), ("fp16", 3)])
def test_cpu_lion(setup, stage, fault):
    operators.require("cpu_lion")
    assert found(fault, setup, stage, LION, offload=True) == []


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("setup", "stage"), [("fp16", 2), ("bf16", 3)])
def test_cpu_adagrad(setup, stage, fault):
    operators.require("cpu_adagrad")
    assert found(fault, setup, stage, ADAGRAD, offload=True) == []


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("setup", "stage"), [("fp16", 0), ("bf16_fp32", 1), ("bf16", 3)])
def test_fused_adam(setup, stage, fault):
    operators.require("fused_adam")
    assert found(fault, setup, stage, ADAM) == []


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize(("operator", "optimizer"), [("fused_lamb", LAMB), ("fused_lion", LION)])
def test_optimizers_for_gpus(operator, optimizer, stage, fault):
    operators.require(operator)
    assert found(fault, "fp16", stage, optimizer) == []


def test_moments_in_half_precision():
    operators.require("cpu_adam")
    halves = {**ADAM, "params": {"lr": 1e-3, "fp32_optimizer_states": False}}
    assert found("optimizer_state", "bf16", 2, halves, offload=True) == []


# -- a part of the optimizer's state on the CPU, and all of it for a while ---------------------------------------------


def offloaded(**offload):
    """Configuration of ZeRO stage 3 with several sub-groups, whose state is offloaded."""
    zero = {"stage": 3, "reduce_bucket_size": 500, "sub_group_size": 1500, "offload_optimizer": offload}
    return {"zero_optimization": zero}


@pytest.mark.parametrize("fault", ["none", "optimizer_state", "gradient"])
def test_a_ratio_of_the_optimizer_offloaded(fault):
    operators.require("cpu_adam")
    assert found(fault, "bf16", 3, ADAM, **offloaded(device="cpu", ratio=0.5)) == []


def test_state_that_is_not_offloaded_is_read(tmp_path):
    operators.require("cpu_adam")
    engine = support.make_engine(
        "bf16", stage=3, optimizer_of=lambda _: None, optimizer=dict(ADAM), **offloaded(device="cpu", ratio=0.5)
    )
    zero = engine.optimizer
    zero.subgroup_to_device = dict.fromkeys(zero.subgroup_to_device, "as on a GPU")  # which then steps by itself
    guard = ng.attach(engine)
    support.train_step(engine)
    flat = zero.fp32_partitioned_groups_flat[0]
    zero.backup_optimizer.state[flat]["exp_avg"][0] = torch.nan
    with pytest.raises(ng.NumericsError):
        engine.save_checkpoint(str(tmp_path))
    assert guard.last_report.first.kind == "optimizer_state"
    guard.detach()


class Trained(support.Model):
    """Nothing is frozen: DeepSpeed's stage 3 does not take back frozen weights that it has moved."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen.requires_grad_(True)


@pytest.mark.parametrize("stage", [1, 3])
def test_states_that_are_offloaded_for_a_while(stage):
    operators.require("fused_adam")

    def losses(is_guarded):
        engine = support.make_engine(
            "bf16", stage=stage, model=Trained(), optimizer_of=lambda _: None, optimizer=dict(ADAM)
        )
        guard = ng.attach(engine) if is_guarded else None
        found = []
        for step in range(4):
            found.append(support.train_step(engine, step))
            engine.offload_states()
            engine.reload_states()
        if guard is None:
            return found
        assert not guard.findings
        assert guard.last_report is None
        support.plant(engine, "hidden.weight", (3, 5))
        with pytest.raises(ng.NumericsError):
            support.train_step(engine, 4)
        assert guard.last_report.first.name == "hidden.weight"
        guard.detach()
        return found

    torch.manual_seed(0)
    alone = losses(is_guarded=False)
    torch.manual_seed(0)
    assert losses(is_guarded=True) == alone


# -- the optimizer's state on NVMe -------------------------------------------------------------------------------------

PIPELINED = MappingProxyType({"pipeline_read": True, "pipeline_write": True, "buffer_count": 12})
AIO = MappingProxyType({"block_size": 1024, "intra_op_parallelism": 1})


@pytest.fixture
def small_files(monkeypatch):
    """DeepSpeed writes tensors of a kibibyte to NVMe too, where else it begins at a mebibyte."""
    operators.require("cpu_adam", "async_io")
    monkeypatch.setattr("deepspeed.runtime.swap_tensor.optimizer_utils.MIN_AIO_BYTES", 1024)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("setup", "more"), [("bf16", {}), ("fp16", {}), ("bf16", PIPELINED)])
def test_the_optimizer_on_nvme(setup, more, fault, small_files, tmp_path):
    config = offloaded(device="nvme", nvme_path=str(tmp_path), **more)
    assert found(fault, setup, 3, ADAM, aio=dict(AIO), **config) == []


class Sometimes(support.Model):
    """Leaves its hidden layers out of a step."""

    are_used = True

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.frozen(self.embedding(tokens))
        if self.are_used:
            x = x + self.output(torch.tanh(self.norm(self.hidden(x))))
        return self.head(x)[..., :7]


def nvme_engine(folder):
    """An engine whose large sub-groups are swapped out."""
    config = offloaded(device="nvme", nvme_path=str(folder))
    config["zero_optimization"]["sub_group_size"] = 400
    return support.make_engine(
        "bf16", stage=3, model=Sometimes(), optimizer_of=lambda _: None, optimizer=dict(ADAM), aio=dict(AIO), **config
    )


def test_gradients_of_a_skipped_step_are_cleared_on_nvme(small_files, tmp_path):
    engine = nvme_engine(tmp_path)
    guard = ng.attach(engine)
    swapper = engine.optimizer.optimizer_swapper
    for step in range(4):
        engine.module.are_used = step != 3
        support.train_step(engine, step, poison=float("nan") if step == 2 else 1.0)
        sizes = [flat.numel() for flat in engine.optimizer.fp32_partitioned_groups_flat]
        assert sizes[:2] == [0, 0], "they are to be on NVMe"
        assert len(swapper.swap_buffer_manager.free_buffer_index) == swapper.swap_config.buffer_count
    assert [record.applied for record in guard.history] == [True, True, False, True]
    assert all(bool(weight.isfinite().all()) for weight in support.weights(engine).values())
    guard.detach()


def test_a_bad_moment_on_nvme_is_not_saved(small_files, tmp_path):
    engine = nvme_engine(tmp_path / "nvme")
    guard = ng.attach(engine)
    support.train_step(engine)
    position = guard._adapter.names.index("hidden.weight")
    assert len(guard._adapter.state_parts_of(position)) == 3  # the master copy and two moments
    engine.save_checkpoint(str(tmp_path / "good"))
    for tensor, piece in guard._adapter.changed_state_parts():
        if piece.parameter == position and not tensor.requires_grad:  # the moments
            tensor[7] = torch.nan
    with pytest.raises(ng.NumericsError, match=r"hidden\.weight"):
        engine.save_checkpoint(str(tmp_path / "bad"))
    assert guard.last_report.first.kind == "optimizer_state"
    assert not (tmp_path / "bad").exists()
    guard.detach()


def on_nvme(folder):
    """Configuration with parameters on NVMe too; with prefetching DeepSpeed 0.19.8 itself fails on small ones."""
    config = offloaded(device="nvme", nvme_path=str(folder))
    buffers = {"buffer_size": 10_000, "buffer_count": 40, "max_in_cpu": 0}
    config["zero_optimization"] |= {
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
        "offload_param": {"device": "nvme", "nvme_path": str(folder), **buffers},
    }
    return {**config, "aio": {"block_size": 512, "intra_op_parallelism": 1}}


@pytest.fixture
def small_parameter_files(small_files, monkeypatch):
    monkeypatch.setattr("deepspeed.runtime.swap_tensor.partitioned_param_swapper.MIN_AIO_BYTES", 512)


@pytest.mark.parametrize("fault", [*FAULTS, "frozen_weight"])
def test_parameters_on_nvme(fault, small_parameter_files, tmp_path):
    case = Case(fault, "transformer", "bf16", 3, False, 1)
    seen = run(case, ADAM, **on_nvme(tmp_path))
    assert seen.findings == (("not_checked", ""),)
    is_finite = fault not in ("weight", "frozen_weight", "optimizer_state")  # which no test can read between steps
    assert problems(case, [replace(seen, findings=(), finite=is_finite)]) == []


def test_what_is_on_nvme_is_said_to_be_unchecked_and_stays_there(small_parameter_files, tmp_path):
    engine = support.make_engine(
        "bf16", stage=3, optimizer_of=lambda _: None, optimizer=dict(ADAM), **on_nvme(tmp_path)
    )
    weight = engine.module.hidden.weight
    guard = ng.attach(engine)
    free = len(weight.nvme_swapper.available_buffer_ids)
    for step in range(3):
        support.train_step(engine, step, poison=float("nan") if step == 1 else 1.0)
        assert weight.ds_tensor.status.name == "NOT_AVAILABLE"
        assert len(weight.nvme_swapper.available_buffer_ids) == free
    assert [record.applied for record in guard.history] == [True, False, True]
    (finding,) = guard.findings
    assert "on NVMe" in finding.message
    assert "hidden.weight" in finding.message
    guard.detach()


RANKS = """
import logging, tempfile, warnings
import deepspeed_support as support
import operators

support.allow_fp16()
operators.load("pin_memory", "async_io", "cpu_adam")
import deepspeed
import deepspeed.runtime.swap_tensor.optimizer_utils as utils
import deepspeed.runtime.swap_tensor.partitioned_param_swapper as parameters
from campaign import worker
from campaign.cases import Case, problems

warnings.filterwarnings("ignore")
deepspeed.init_distributed("gloo")
logging.disable(logging.CRITICAL)
utils.MIN_AIO_BYTES = parameters.MIN_AIO_BYTES = 512
OFFLOAD = {"device": "nvme", "nvme_path": FOLDER}
ZERO = {"stage": 3, "reduce_bucket_size": 500, "sub_group_size": 1500, "offload_optimizer": OFFLOAD}

def run(case, zero):
    return worker.run(
        case, optimizer_of=lambda _: None, optimizer={"type": "AdamW", "params": {"lr": 1e-3}},
        zero_optimization=zero, aio={"block_size": 512, "intra_op_parallelism": 1},
    )

for fault in ("none", "optimizer_state", "input"):
    case = Case(fault, "transformer", "bf16", 3, False, 2)
    assert problems(case, [run(case, ZERO)]) == []
buffers = {"buffer_size": 10_000, "buffer_count": 40, "max_in_cpu": 0}
seen = run(Case("weight", "transformer", "bf16", 3, False, 2), {
    **ZERO, "offload_param": {**OFFLOAD, **buffers},
    "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0,
})
assert (seen.verdict, seen.raised) == ("weights_nonfinite", True), seen
assert seen.first == ("parameter", "blocks.1.mlp.0.weight (this rank's part of it)", (255,), 1), seen
"""


@pytest.mark.multiprocess
def test_nvme_of_two_ranks(tmp_path):
    operators.require("cpu_adam", "async_io")
    support.run_ranks(f"FOLDER = {str(tmp_path)!r}\n{RANKS}", tmp_path)
