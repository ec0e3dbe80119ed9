"""ZeRO++ hpZ: a second copy of the weights, which is gathered in place of the first."""

from __future__ import annotations

import pytest

from deepspeed_support import HEAD, run_ranks

pytestmark = pytest.mark.multiprocess

SCRIPT = """
engine = support.make_engine("bf16", stage=3, zero_optimization={"stage": 3, "zero_hpz_partition_size": 2})
guard = ng.attach(engine, WARN)
for step in range(2):
    support.train_step(engine, step)
frozen = engine.module.frozen.weight
if RANK == 1:
    frozen.ds_secondary_tensor.view(-1)[3] = torch.nan
support.train_step(engine, 2)
first = guard.last_report.first
assert guard.last_report.verdict == "weights_nonfinite", guard.last_report
assert first.name == "frozen.weight (this rank's part of its hpZ copy)", first
assert (first.index, first.rank, first.nan) == ((3,), 1, 1), first
assert [row.applied for row in guard.history] == [True, True, False]
"""


def test_a_bad_copy_of_a_frozen_weight_is_named(tmp_path):
    run_ranks(HEAD + SCRIPT, tmp_path, timeout=130)
