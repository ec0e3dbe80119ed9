"""What the scanner reads of a file of torch.save is what torch.load would give, or it says that it could not tell."""

from __future__ import annotations

import argparse
import random
import struct
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_archives as archives
from torch import nn

import hallo_numguard as ng
from hallo_numguard.core.findings import PreflightReport

CASES = 400
NAN = struct.pack("<4f", 1, 2, 3, float("nan")).ljust(archives.RECORD_BYTES, b"\0")
GOOD = struct.pack("<4f", 1, 2, 3, 4).ljust(archives.RECORD_BYTES, b"\0")


def test_random_archives_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    taken = 0
    for seed in range(CASES):
        path.write_bytes(archives.random_archive(seed))
        assert archives.difference(path) is None, seed
        taken += archives.loaded(path) is not None
    assert taken > CASES // 4  # the grammar writes enough that torch takes


def weight(**extra: bytes) -> bytes:
    """Returns the pickle of a dictionary with one tensor and other values."""
    chance = random.Random(0)
    made = archives.Writer(chance)
    parts = (
        archives.storage("0", 16, "Float") + archives.integer(0) + archives.numbers((2, 2)) + archives.numbers((2, 1))
    )
    hooks = archives.glob("collections", "OrderedDict") + b")R"
    tensor = archives.glob("torch._utils", "_rebuild_tensor_v2") + b"(" + parts + b"\x89" + hooks + b"tR"
    del made
    items = archives.text("weight") + tensor + b"".join(archives.text(name) + value for name, value in extra.items())
    return archives.glob("collections", "OrderedDict") + b")R(" + items + b"u"


def written(path: Path, body: bytes, data: bytes = GOOD, **others: bytes) -> PreflightReport:
    """Scans an archive of a pickle and one record, and others by name (with __ for a slash)."""
    records = [("archive/data.pkl", b"\x80\x02" + body + b"."), ("archive/data/0", data), ("archive/version", b"3\n")]
    records += [(f"archive/{name.replace('__', '/')}", content) for name, content in others.items()]
    path.write_bytes(archives.archive(records))
    return ng.scan(path)


@pytest.mark.parametrize("name", ["items", "keys", "__iter__", "values"])
def test_a_dictionary_whose_methods_were_replaced_hides_nothing(tmp_path: Path, name: str) -> None:
    state = b"}(" + archives.text(name) + archives.glob("__builtin__", "set") + b"ub"
    assert written(tmp_path / "a.pt", weight() + state).ok
    assert written(tmp_path / "b.pt", weight() + state, NAN).exit_code == 1


def test_names_that_differ_in_case_only_are_refused(tmp_path: Path) -> None:
    assert written(tmp_path / "a.pt", weight(), GOOD, DATA__0=NAN).exit_code == 1
    assert written(tmp_path / "b.pt", weight(), GOOD, data__1=NAN).ok


def test_the_other_byte_order_is_told(tmp_path: Path) -> None:
    assert written(tmp_path / "a.pt", weight(), GOOD, byteorder=b"big").exit_code == 1
    assert written(tmp_path / "b.pt", weight(), GOOD, byteorder=b"little").ok


def test_a_second_directory_is_refused(tmp_path: Path) -> None:
    records = [
        ("archive/data.pkl", b"\x80\x02" + weight() + b"."),
        ("archive/data/0", GOOD),
        ("archive/version", b"3\n"),
    ]
    whole = archives.archive(records)
    (tmp_path / "a.pt").write_bytes(whole + whole)
    assert ng.scan(tmp_path / "a.pt").exit_code == 1


def nested(depth: int, value: Any) -> Any:
    for _ in range(depth):
        value = [value]
    return value


class Plain:
    """An object of a class that is nobody's but the user's."""


def in_object(value: Any) -> Any:
    made = Plain()
    made.held = value
    return made


CONTAINERS = {
    "deep": lambda value: nested(120, value),
    "set": lambda value: {value},
    "deque": lambda value: deque([value]),
    "namespace": lambda value: argparse.Namespace(held=value),
    "storage": lambda value: value.untyped_storage(),
    "typed storage": lambda value: torch.storage.TypedStorage(
        wrap_storage=value.untyped_storage(), dtype=value.dtype, _internal=True
    ),
    "sparse": lambda value: value.to_sparse(),
    "nested": lambda value: torch.nested.nested_tensor([value, value]),
    "parameter": nn.Parameter,
    "complex": lambda value: torch.complex(value, value),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [name for name in CONTAINERS if name != "storage"])
def test_values_in_any_container_are_read(tmp_path: Path, name: str) -> None:
    for bad, expected in ((1.0, 0), (float("nan"), 1)):
        value = torch.rand(4, 4)
        value[1, 2] = bad
        torch.save({"a": CONTAINERS[name](value)}, tmp_path / "a.pt")
        assert ng.scan(tmp_path / "a.pt").exit_code == expected


@pytest.mark.parametrize("legacy", [False, True])
def test_values_in_objects_are_read_as_stored_and_that_is_said(tmp_path: Path, legacy: bool) -> None:
    for bad, expected in ((1.0, 2), (float("nan"), 1)):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        model[1].weight.data[2, 3] = bad
        torch.save({"model": model}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
        report = ng.scan(tmp_path / "a.pt")
        assert report.exit_code == expected
        (sentence,) = report.unchecked
        assert "save its state_dict()" in sentence
        assert "torch.nn.modules" in sentence
    assert report.findings[0].name == "model.1.weight"


def test_settings_of_unknown_classes_beside_weights_are_one_line(tmp_path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.rand(3)}, "settings": in_object(1)}, tmp_path / "a.pt")
    report = ng.scan(tmp_path / "a.pt")
    assert report.exit_code == 0
    assert [finding.kind for finding in report.findings] == ["classes"]
    torch.save(in_object(1), tmp_path / "b.pt")
    assert ng.scan(tmp_path / "b.pt").findings == ()


def test_a_tensor_without_values_could_not_be_checked(tmp_path: Path) -> None:
    torch.save({"a": torch.empty(3, device="meta")}, tmp_path / "a.pt")
    assert ng.scan(tmp_path / "a.pt").exit_code == 2
