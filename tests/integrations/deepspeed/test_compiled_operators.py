"""The optimizers that DeepSpeed compiles: the same faults are named as with torch's.

They are built by `make deepspeed-ops-test`; without, these tests are skipped.
"""

from __future__ import annotations

from types import MappingProxyType

import pytest

import deepspeed_support as support
import operators
from campaign.cases import Case, problems

pytestmark = pytest.mark.deepspeed

FAULTS = ("none", "weight", "optimizer_state", "input", "gradient")
ADAM = MappingProxyType({"type": "AdamW", "params": {"lr": 1e-3}})


@pytest.fixture(autouse=True)
def half_precision_on_the_cpu():
    support.single_process_environment()
    support.allow_fp16()


def found(case, optimizer, **config):
    """Returns what is wrong with what was seen of a case whose optimizer DeepSpeed makes by its configuration."""
    from campaign import worker  # which asks for the rank

    seen = worker.run(case, optimizer_of=lambda _: None, optimizer=dict(optimizer), **config)
    assert seen.alone in (None, "runs")
    return problems(case, [seen])


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("setup", "stage"), [("fp16", 1), ("bf16", 2), ("fp16", 2), ("bf16", 3), ("fp16", 3)])
def test_cpu_adam(setup, stage, fault):
    operators.require("cpu_adam")
    assert found(Case(fault, "transformer", setup, stage, True, 1), ADAM) == []


def on_nvme(folder, **more):
    """Configuration of ZeRO stage 3 with the optimizer's state on NVMe, in several sub-groups."""
    offload = {"device": "nvme", "nvme_path": str(folder), **more}
    zero = {"stage": 3, "reduce_bucket_size": 500, "sub_group_size": 1500, "offload_optimizer": offload}
    return {"zero_optimization": zero, "aio": {"block_size": 1024, "intra_op_parallelism": 1}}


@pytest.fixture
def small_files(monkeypatch):
    """DeepSpeed writes tensors of a kibibyte to NVMe too, where else it begins at a mebibyte."""
    operators.require("cpu_adam", "async_io")
    monkeypatch.setattr("deepspeed.runtime.swap_tensor.optimizer_utils.MIN_AIO_BYTES", 1024)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("setup", ["bf16", "fp16"])
def test_the_optimizer_on_nvme(setup, fault, small_files, tmp_path):
    assert found(Case(fault, "transformer", setup, 3, False, 1), ADAM, **on_nvme(tmp_path)) == []
