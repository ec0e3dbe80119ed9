"""One read of a file for everything: records, digests, checksums and pages, whatever the threads and the way."""

from __future__ import annotations

import hashlib
import os
import random
import zlib
from pathlib import Path
from typing import Any

import blake3
import pytest
import torch

import hallo_numguard as ng
from hallo_numguard.core.records import Record
from hallo_numguard.files.formats import Checksum, DamagedFile, TensorEntry
from hallo_numguard.files.scan import reading
from hallo_numguard.files.scan.reading import ScannedFile, read_file
from hallo_numguard.ops.backends import cpu as native
from hallo_numguard.ops.native_extension import extension

PAGE = 4096
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int32]


def packed(path: Path, gap: int, seed: int = 0) -> tuple[list[TensorEntry], list[torch.Tensor]]:
    """Writes tensors of many sizes one after the other, at any offset, and returns where they lie."""
    randomly = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    entries, tensors, data = [], [], bytearray(gap)
    for number in range(60):
        dtype = randomly.choice(DTYPES)
        numel = randomly.choice([0, 1, 7, 1000, 70_001, 400_003])
        tensor = (torch.randn(numel, generator=generator) * 100).to(dtype)
        if numel > 1 and dtype.is_floating_point and number % 3 == 0:
            tensor[randomly.randrange(numel)] = float("nan")
        raw = tensor.view(torch.uint8).numpy().tobytes() if numel else b""
        entries.append(TensorEntry(f"t{number}", "parameter", dtype, (numel,), path, len(data), len(raw)))
        tensors.append(tensor)
        data += raw + bytes(randomly.randrange(gap + 1))
    path.write_bytes(data)
    return entries, tensors


def records(file: ScannedFile) -> list[Record | None]:
    return [tensor.record for tensor in file.tensors]


def check(file: ScannedFile, tensors: list[torch.Tensor]) -> None:
    for record, tensor in zip(records(file), tensors, strict=True):
        if not tensor.is_floating_point():
            assert record is None
            continue
        assert record is not None
        (expected,) = ng.tensor_stats(tensor).to_host()
        assert record.sumsq == pytest.approx(expected.sumsq, rel=1e-6)
        for name in ("nan", "pos_inf", "neg_inf", "absmax", "first_nonfinite"):
            assert getattr(record, name) == getattr(expected, name), name


@pytest.mark.parametrize("gap", [0, 3, 64])
@pytest.mark.parametrize("hashes", [(), ("sha256",)])
def test_records_are_those_of_the_tensors(tmp_path: Path, gap: int, hashes: tuple[str, ...]) -> None:
    entries, tensors = packed(tmp_path / "file", gap)
    check(read_file(tmp_path / "file", entries, hashes), tensors)


@pytest.mark.usefixtures("each_cpu_backend")
def test_records_are_the_same_on_every_backend(tmp_path: Path) -> None:
    entries, tensors = packed(tmp_path / "file", 3)
    check(read_file(tmp_path / "file", entries, ()), tensors)


@pytest.mark.parametrize("hashes", [(), ("sha256",)])
def test_the_number_of_threads_changes_nothing(tmp_path: Path, hashes: tuple[str, ...]) -> None:
    entries, _ = packed(tmp_path / "file", 3)
    facts = [read_file(tmp_path / "file", entries, hashes, threads=threads) for threads in (1, 2, 5)]
    assert facts[0] == facts[1] == facts[2]


def test_digests_of_the_file_and_of_tensors(tmp_path: Path) -> None:
    entries, _ = packed(tmp_path / "file", 3)
    data = (tmp_path / "file").read_bytes()
    facts = read_file(tmp_path / "file", entries, ("sha256", "md5", "blake3"), tensor_hash="sha256")
    assert facts.digests == {
        "sha256": hashlib.sha256(data).hexdigest(),
        "md5": hashlib.md5(data).hexdigest(),
        "blake3": blake3.blake3(data).hexdigest(),
    }
    expected = [hashlib.sha256(data[one.offset : one.offset + one.nbytes]).hexdigest() for one in entries]
    assert [tensor.digest for tensor in facts.tensors] == expected


@pytest.mark.parametrize("combine", [reading.crc32_combine, None], ids=["isal", "zlib"])
def test_checksums_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, combine: Any) -> None:
    monkeypatch.setattr(reading, "crc32_combine", combine)
    path = tmp_path / "file"
    data = os.urandom(5 << 20)
    path.write_bytes(data)
    places = [(0, 10), (10, 3 << 20), ((3 << 20) + 10, (2 << 20) - 10), (100, 0)]
    sums = [Checksum(path, str(n), at, size, zlib.crc32(data[at : at + size])) for n, (at, size) in enumerate(places)]
    assert read_file(path, (), (), checksums=sums).mismatches == ()
    path.write_bytes(data[: 2 << 20] + b"?" + data[(2 << 20) + 1 :])
    assert [one.name for one in read_file(path, (), (), checksums=sums).mismatches] == ["1"]


@pytest.mark.parametrize("hashes", [(), ("sha256",)])
def test_zero_pages_and_repeated_pages(tmp_path: Path, hashes: tuple[str, ...]) -> None:
    data = bytearray(os.urandom(3 << 20))
    data[8 * PAGE : 10 * PAGE] = bytes(2 * PAGE)
    data[20 * PAGE + 1 : 21 * PAGE] = bytes(PAGE - 1)
    data[30 * PAGE : 30 * PAGE + 8] = bytes(8)
    data[700 * PAGE : 703 * PAGE] = data[100 * PAGE : 103 * PAGE]
    (tmp_path / "file").write_bytes(data)
    facts = read_file(tmp_path / "file", (), hashes)
    assert facts.zero_pages == ((8 * PAGE, 2 * PAGE),)
    assert facts.repeated_pages == ((700 * PAGE, 100 * PAGE, 3 * PAGE),)


def test_pages_of_a_pattern_are_no_repeats(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes((os.urandom(64) * 64 + os.urandom(PAGE)) * 4)
    assert [at for at, _, _ in read_file(tmp_path / "file", (), ()).repeated_pages] == [3 * PAGE, 5 * PAGE, 7 * PAGE]


def test_views_of_the_same_bytes_are_read_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(4000))
    views = [TensorEntry(str(at), "parameter", torch.float32, (500,), path, at, 2000) for at in range(0, 2000, 4)]
    with pytest.raises(DamagedFile, match="overlap"):
        read_file(path, views, ())
    facts = read_file(path, [views[0]] * 500, ())
    assert len(set(records(facts))) == 1


@pytest.mark.parametrize("hashes", [(), ("sha256",)])
def test_a_file_that_is_too_short_for_its_tensors(tmp_path: Path, hashes: tuple[str, ...]) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    with pytest.raises(DamagedFile, match="shorter than its tensors"):
        read_file(path, [TensorEntry("a", "parameter", torch.float32, (30,), path, 0, 120)], hashes)


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    facts = read_file(tmp_path / "file")
    assert facts.digests == {"sha256": hashlib.sha256().hexdigest()}
    assert facts.nbytes == 0


def test_progress_adds_up_to_the_size(tmp_path: Path) -> None:
    entries, _ = packed(tmp_path / "file", 3)
    for hashes in ((), ("sha256",)):
        seen: list[int] = []
        read_file(tmp_path / "file", entries, hashes, progress=seen.append)
        assert sum(seen) == (tmp_path / "file").stat().st_size


@pytest.mark.skipif(extension() is None, reason="needs the native extension")
def test_a_file_that_shrinks_while_it_is_scanned_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * PAGE))
    with path.open("rb") as file, pytest.raises(EOFError):
        native.scan_file(file.fileno(), 0, 4 * PAGE, [], torch.zeros(4, dtype=torch.int64))
