"""What is refused, and how: the list that the documentation shows."""

from __future__ import annotations

import pytest

import hallo_numguard as ng
from hallo_numguard.integrations.deepspeed.unsupported import UNSUPPORTED

import deepspeed_support as support

pytestmark = pytest.mark.deepspeed


@pytest.fixture(scope="module")
def engine():
    return support.make_engine("bf16", stage=2)


class OfTwo:
    """Groups of two ranks, of which a job of one has one."""

    def get_model_parallel_world_size(self):
        return 2

    def get_data_parallel_world_size(self):
        return 1


SHOWN = {
    "an engine without optimizer": ("", "optimizer", None),
    "AutoEP": ("module", "__class__", "AutoEPMoELayer"),
    "tensor parallelism on a part of the ranks": ("", "mpu", OfTwo()),
    "ZenFlow": ("", "zenflow", True),
    "SuperOffload": ("optimizer", "__class__", "SuperOffloadOptimizer_Stage3"),
    "DeepCompile": ("", "is_deepcompile_enabled", lambda: True),
    "1-bit optimizers": ("basic_optimizer", "__class__", "OnebitAdam"),
    "MiCS": ("optimizer", "__class__", "MiCS_Optimizer"),
}


@pytest.mark.parametrize("item", [item for item in UNSUPPORTED if item.feature in SHOWN], ids=lambda item: item.feature)
def test_what_is_refused_is_refused_with_what_to_do(item, engine, monkeypatch):
    owner_name, attribute, value = SHOWN[item.feature]
    owner = getattr(engine, owner_name) if owner_name else engine
    if attribute == "__class__":
        value = type(value, (type(owner),), {})
    monkeypatch.setattr(owner, attribute, value, raising=False)
    before = dict(vars(engine))
    with pytest.raises(ng.UnsupportedDeepSpeed) as refused:
        ng.attach(engine)
    assert all(text in str(refused.value) for text in (item.reason, item.remedy, item.shown_by))
    assert dict(vars(engine)) == before


# On real pipelines: test_pipeline.py
OF_PIPELINES = {"tensor parallelism inside of a pipeline", "experts inside of a pipeline"}
QUANTIZED = "quantized gradients (ZeRO++ qgZ) over several nodes"  # on real engines: test_quantized_weights.py


def test_experts_beside_tensor_parallelism_are_refused(engine, monkeypatch):
    elsewhere = {"experts beside tensor parallelism", QUANTIZED}
    assert {item.feature for item in UNSUPPORTED} == {*SHOWN, *OF_PIPELINES, *elsewhere}
    monkeypatch.setattr(engine, "has_moe_layers", True)
    monkeypatch.setattr(engine, "mpu", OfTwo())
    with pytest.raises(ng.UnsupportedDeepSpeed, match="experts beside tensor parallelism"):
        ng.attach(engine)


def test_an_engine_that_is_dense_is_not_refused(engine):
    ng.attach(engine).detach()
