"""Methods that are replaced on instances, and copies of these instances."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
from torch import nn

from hallo_numguard.integrations.patches import MethodPatches


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.calls = 0

    def training_step(self, batch: int, times: int = 1) -> int:
        self.calls += 1
        return batch * times


def double(original, *args, **kwargs):
    return 2 * original(*args, **kwargs)


def instance_attribute(batch, times=1):
    return -batch


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("wrapped", [1, 2])
def test_a_copy_has_the_method_itself(copied, wrapped):
    model = Model()
    patches = [MethodPatches() for _ in range(wrapped)]
    for one in patches:
        one.wrap(model, "training_step", double)
    assert model.training_step(3, times=2) == 6 * 2**wrapped
    assert list(inspect.signature(model.training_step).parameters) == ["batch", "times"]
    other = copied(model)
    assert other.training_step(3) == 3
    assert (model.calls, other.calls) == (1, 2), "bound to the copy"
    assert b"numguard" not in pickle.dumps(model)
    for one in reversed(patches):
        one.restore()
    assert "training_step" not in vars(model)


def test_an_attribute_of_the_instance_is_copied():
    model = Model()
    model.training_step = instance_attribute
    patches = MethodPatches()
    patches.wrap(model, "training_step", double)
    assert model.training_step(3) == -6
    assert pickle.loads(pickle.dumps(model)).training_step(3) == -3
    patches.restore()
    assert model.training_step is instance_attribute


def test_patches_come_off_in_any_order():
    model = Model()
    lower, upper = MethodPatches(), MethodPatches()
    lower.wrap(model, "training_step", double)
    upper.wrap(model, "training_step", double)
    lower.restore()
    assert model.training_step(3) == 6
    assert model.training_step.__wrapped__.__func__ is Model.training_step
    upper.restore()
    assert "training_step" not in vars(model)
