"""Pickles without their code: hostile ones are refused in bounded memory, and nothing that they name is imported."""

from __future__ import annotations

import contextlib
import pickle
import struct
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hallo_numguard.files.formats import DamagedFile, load, open_source
from hallo_numguard.files.formats.pickles import plain, unpickle


def push(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


BOMBS = {
    "memo": push(b"N", b"r", struct.pack("<I", (1 << 32) - 1)),
    "bytearray": push(b"\x96", struct.pack("<Q", 1 << 40)),
    "bytes": push(b"\x8e", struct.pack("<Q", 1 << 40)),
    "frame": push(b"\x95", struct.pack("<Q", 1 << 60), b"N"),
    "long": push(b"\x8b", struct.pack("<i", (1 << 31) - 1)),
    "negative long": push(b"\x8b", struct.pack("<i", -5)),
    "deep tuple as key": push(b"}", b")", b"\x85" * 200_000, b"N", b"s"),
    "deep list": push(b"]" * 100_000, b"a" * 99_999),
    "doubled tuples as key": push(b"}", b")", b"2\x86" * 60, b"N", b"s"),
    "one heavy key many times": push(b"}", b")", b"2\x86" * 18, b"q\x00", b"0", b"h\x00Ns" * 5000),
    "sets of one heavy list": push(
        b"]q\x00", b")", b"2\x86" * 18, b"a0", b"c__builtin__\nset\nq\x01", b"0h\x01h\x00\x85R" * 5000
    ),
    "texts without end": push(
        b"c_codecs\nencode\nq\x00",
        b"X",
        struct.pack("<I", 100_000),
        b"a" * 100_000,
        b"q\x01",
        b"h\x00h\x01\x85R" * 20_000,
    ),
    "no stop": b"\x80\x02N",
    "empty": b"",
    "underflow": push(b"0" * 5),
    "mark": push(b"("),
    "mark taken": push(b"(\x85"),
    "extension": push(b"\x82\x01"),
    "get of nothing": push(b"h\x05"),
    "reduce of a number": push(b"K\x01)R"),
    "build of a number": push(b"K\x01}b"),
    "persistent id": push(b"K\x01Q"),
    "buffer": b"\x80\x05\x97.",
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_pickles_that_are_built_to_exhaust_memory_or_to_crash(name: str) -> None:
    tracemalloc.start()
    with pytest.raises(DamagedFile, match="pickle"):
        unpickle(BOMBS[name])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 << 20


def test_lists_that_unfold_without_end_are_cut_off() -> None:
    made = [b"]q" + bytes([n]) + b"0" for n in range(60)]
    linked = [b"h%c(h%ch%ce0" % (n, n + 1, n + 1) for n in range(59)]  # each twice in the one before, while it is empty
    copy = plain(unpickle(push(*made, *linked, b"h\x00")).value)
    assert len(copy) == 2


@pytest.mark.parametrize(
    "data",
    [
        push(b"ccollections\nOrderedDict\n", b"}X\x01\x00\x00\x00aNs", b"b"),
        push(b"ctorch._utils\n_rebuild_tensor_v2\n", b"}X\x08\x00\x00\x00functionNs", b"b"),
        push(b"c__main__\nX\n", b"}X\x0c\x00\x00\x00__setstate__Ns", b"b"),
    ],
    ids=["class", "stand-in", "foreign"],
)
def test_a_pickle_cannot_change_what_it_finds(tmp_path: Path, data: bytes) -> None:
    before = vars(OrderedDict).keys() | set()
    with contextlib.suppress(DamagedFile):
        unpickle(data)
    assert vars(OrderedDict).keys() == before
    torch.save(OrderedDict(weight=torch.ones(3)), tmp_path / "a.pt")
    (entry,) = open_source(tmp_path / "a.pt").entries
    assert torch.equal(load(entry), torch.ones(3))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 5))
def test_no_bytes_at_all_break_the_unpickler(data: bytes, protocol: int) -> None:
    for candidate in (data, bytes([0x80, protocol]) + data + b"."):
        try:
            unpickle(candidate)
        except DamagedFile:
            continue


@settings(max_examples=150, deadline=None)
@given(st.integers(min_value=0), st.binary(min_size=1, max_size=9))
def test_no_bytes_in_a_real_pickle_break_the_unpickler(place: int, data: bytes) -> None:
    real = pickle.dumps({"a": [1, 2.5, "x", (None, True)], "b": OrderedDict(c={4: b"5"})}, protocol=2)
    at = place % len(real)
    for candidate in (real[:at] + data + real[at:], real[:at] + data + real[at + len(data) :]):
        try:
            unpickle(candidate)
        except DamagedFile:
            continue


def member_of(module: str, cls: str, name: str) -> bytes:
    """A member of an enumeration as Python 3.11.0 to 3.11.3 pickles it: by getattr."""
    return f"cbuiltins\ngetattr\n(c{module}\n{cls}\nV{name}\ntR.".encode()


def test_a_member_of_a_known_enumeration_is_no_code_and_that_of_anything_else_is() -> None:
    stage = unpickle(member_of("deepspeed.runtime.zero.config", "ZeroStageEnum", "gradients"))
    assert stage.value.args == ("gradients",)
    assert "builtins.getattr" not in stage.foreign
    assert "builtins.getattr" in unpickle(member_of("deepspeed.runtime.zero.config", "os", "system")).foreign
    assert "builtins.getattr" in unpickle(member_of("builtins", "dict", "fromkeys")).foreign
