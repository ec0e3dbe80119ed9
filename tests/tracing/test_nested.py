"""Nested values are looked through, whatever they are made of, and what cannot be is said to be opaque."""

from __future__ import annotations

import collections
import random
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from hallo_numguard.tracing.nested import as_plain, contents_of, floating_tensors_in, is_readable


class Sub(torch.Tensor):
    pass


class Object:
    def __init__(self, inside):
        self.inside = inside


@dataclass
class Data:
    inside: object


Pair = collections.namedtuple("Pair", "inside other")

WRAPPERS = {
    "list": (lambda x: [0, x], "value[1]"),
    "dict": (lambda x: {"a": x}, "value['a']"),
    "set": (lambda x: {x}, "value{0}"),
    "dataclass": (Data, "value.inside"),
    "namespace": (lambda x: types.SimpleNamespace(inside=x), "value.inside"),
    "object": (Object, "value.inside"),
    "named tuple": (lambda x: Pair(x, "text"), "value[0]"),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_tensor_is_found_inside_of(kind):
    wrap, path = WRAPPERS[kind]
    tensor = torch.ones(2)
    found = contents_of("value", wrap(tensor))
    assert [(name, inner is tensor) for name, inner in found.tensors] == [(path, True)]
    assert found.opaque == []


def test_a_value_that_contains_itself_is_looked_through_once():
    batch = {"x": torch.ones(2)}
    batch["self"] = [batch, Object(batch)]
    assert [name for name, _ in contents_of("batch", batch).tensors] == ["batch['x']"]


def test_what_cannot_be_looked_through_is_opaque():
    deep = torch.ones(1)
    for _ in range(50):
        deep = [deep]
    found = contents_of("value", [iter([torch.ones(1)]), deep, "text", 3, None, len, torch.float16, np.ones(2)])
    assert found.opaque[0] == "value[0]"
    assert len(found.opaque) == 2
    assert found.tensors == []


def test_generators_and_containers_are_told_apart():
    generators = [torch.Generator(), random.Random(0), np.random.default_rng(0), np.random.RandomState(0)]
    found = contents_of("value", {"all": generators})
    assert found.generators == generators
    assert found.containers == [{"all": generators}, generators]


def test_kinds_of_tensors():
    readable = [
        torch.ones(2),
        torch.ones(2).bfloat16(),
        torch.nn.Parameter(torch.ones(1)),
        torch.ones(2).as_subclass(Sub),
    ]
    others = [torch.ones(2, dtype=torch.int8), torch.ones(2).to_sparse(), torch.ones(2, device="meta")]
    assert [is_readable(tensor) for tensor in readable + others] == [True] * 4 + [False] * 3
    assert len(floating_tensors_in("value", readable + others)) == 4
    assert {type(as_plain(tensor)) for tensor in readable} == {torch.Tensor}
    assert as_plain(readable[3]).data_ptr() == readable[3].data_ptr()
