"""Updates that make weights non-finite, of a GuardedOptimizer in two real processes."""

from __future__ import annotations

import pytest
from test_optimizer_ranks import COMMON

from deepspeed_support import run_ranks

pytestmark = pytest.mark.multiprocess

NAN_RATE = """
def plant(optimizer, model):
    steps = []

    def before(*_):
        steps.append(1)
        for group in optimizer.param_groups:
            group["lr"] = float("nan") if len(steps) == 3 else 1e-3

    optimizer._optimizer.register_step_pre_hook(before)

def ddp(model):
    called = DistributedDataParallel(model)
    return called, called

def fsdp2(model):
    from torch.distributed.fsdp import fully_shard
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return model, model

for wrap in (ddp, fsdp2):
    optimizer, reports, _ = train(AdamW, wrap, plant)
    (report,) = reports
    print(wrap.__name__, [(item.kind, item.step) for item in optimizer.findings])
    print(wrap.__name__, report.step, report.verdict, report.evidence[0], report.world_size, report.first.name)
    optimizer.detach()
"""


def test_ranks_agree_in_the_next_step_on_the_update_that_wrote_it(tmp_path):
    outputs = run_ranks(COMMON + NAN_RATE, tmp_path)
    for output in outputs:
        for name in ("ddp", "fsdp2"):
            assert f"{name} [('update_nonfinite', 3)]" in output, output
            assert f"{name} 4 update_nonfinite made by the update of step 3 2 " in output, output
