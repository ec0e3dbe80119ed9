"""ZeRO++ qwZ: ranks exchange weights as 8-bit numbers, in which a NaN is 0, and an Inf makes its whole group NaN."""

from __future__ import annotations

import pytest
import quantizer
import torch

import operators
from deepspeed_support import DEVICE, HEAD, run_ranks

SCRIPT = """
import quantizer
from deepspeed.runtime.zero.partition_parameters import CUDAQuantizer

CUDAQuantizer.quantizer_cuda_module = quantizer
BAD = "first.weight", (32, 3)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(32, 64)
        self.frozen = torch.nn.Linear(64, 64).requires_grad_(False)
        self.last = torch.nn.Linear(64, 32)

    def forward(self, x):
        return self.last(torch.tanh(self.frozen(torch.tanh(self.first(x)))))


def step(engine, number, first=0.5):
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2 * number + RANK))
    x[0, 0] = first
    loss = engine(x.to(engine.module.last.weight.dtype)).float().square().mean()
    engine.backward(loss)
    engine.step()
    return loss.item()


def plant(engine, name, value):
    if RANK == 1:
        engine.module.get_parameter(name).ds_tensor.data.view(-1)[3] = value


for setup in ("fp16", "bf16"):
    zero = {"stage": 3, "zero_quantized_weights": True}
    engines = [support.make_engine(setup, stage=3, model=Model(), zero_optimization=zero) for _ in range(2)]
    engine, guard = engines[0], ng.attach(engines[0], WARN)
    for number in range(3):
        losses = [step(one, number) for one in engines]
        assert losses[0] == losses[1], (setup, losses)
    assert guard.last_report is None and guard.findings == []

    step(engine, 3, torch.nan if RANK == 1 else 0.5)
    first = guard.last_report.first
    assert (guard.last_report.verdict, first.name, first.index, first.rank) == ("input_nonfinite", "x", (0, 0), 1)

    plant(engine, BAD[0], torch.nan)  # all ranks train on with 0, and the update writes over it
    assert torch.isfinite(torch.tensor(step(engine, 4)))
    step(engine, 5)
    assert guard.last_report.step == 4
    if RANK == 1:
        (found,) = guard.findings
        assert (found.kind, found.offender.name, found.offender.index, found.offender.nan) == ("nonfinite", *BAD, 1)
        assert "seen at step 5, and finite again after its update" in found.message, found.message
        assert "master copy is finite" in found.message, found.message

    for number, name in enumerate(("first.weight", "frozen.weight"), 6):
        plant(engine, name, torch.inf)
        step(engine, number)
        report = guard.last_report
        assert (report.step, report.verdict) == (number + 1, "weights_nonfinite"), report
        assert (report.first.name, report.first.index, report.first.rank) == (name, BAD[1], 1), report
        plant(engine, name, 0.0)
    assert [row.applied for row in guard.history] == [True] * 3 + [False] + [True] * 2 + [False] * 2
    guard.detach()
"""


@pytest.mark.multiprocess
def test_a_bad_weight_is_named_though_the_exchange_hides_it(tmp_path):
    run_ranks(HEAD + SCRIPT, tmp_path, timeout=130)


REFUSED = """
import pytest

zero = {"stage": 3, "zero_quantized_gradients": True}
engine = support.make_engine("bf16", stage=3, zero_optimization=zero)
with pytest.raises(ng.UnsupportedDeepSpeed, match="quantized gradients"):
    ng.attach(engine)
"""


@pytest.mark.multiprocess
def test_gradients_that_are_quantized_between_nodes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_SIZE", "1")  # two nodes of one device
    run_ranks(HEAD + REFUSED, tmp_path, timeout=60)


@pytest.mark.multiprocess
def test_on_one_node_deepspeed_quantizes_no_gradients(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_SIZE", "2")
    attached = REFUSED.partition("with pytest")[0] + "guard = ng.attach(engine)\nsupport.train_step(engine, 0)\n"
    run_ranks(HEAD + attached + "assert guard.history[0].applied\n", tmp_path, timeout=60)


@pytest.mark.parametrize("bad", [None, torch.nan, torch.inf])
def test_the_operator_of_a_gpu_does_what_is_said_of_it(bad):
    """`make deepspeed-ops-test` builds it with DS_ACCELERATOR=cuda. Its 8-bit numbers are those of tests/support."""
    if DEVICE.type == "cpu":
        pytest.skip("DeepSpeed has this operator for GPUs only")
    from deepspeed.ops.op_builder.builder import OpBuilder

    operators.require("quantizer")
    operator = OpBuilder._loaded_ops["quantizer"]
    values = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).half()
    if bad is not None:
        values[1, 3] = bad
    numbers, scales = operator.quantize(values.to(DEVICE), 4, 8, operator.Symmetric)
    expected, expected_scales = quantizer.quantize(values, 4, 8, quantizer.Symmetric)
    assert (numbers.cpu().int() - expected.int()).abs().max() <= 1
    assert torch.allclose(scales.cpu().flatten(), expected_scales)
    back = operator.dequantize(numbers, scales, 4, 8, operator.Symmetric).cpu()
    ours = quantizer.dequantize(expected, expected_scales, 4, 8, quantizer.Symmetric)
    for result in (back, ours):
        assert torch.isfinite(result).all(dim=1).tolist() == [True, bad is not torch.inf, True, True]
