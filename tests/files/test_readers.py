"""Readers of files and folders: what they find in intact ones, and what they say of damaged and of hostile ones."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import nn

import hallo_numguard as ng
from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats import DamagedFile, Source, TensorEntry, UnknownLayout, load, open_source
from hallo_numguard.files.formats.pickles import inert, unpickle

from checkpoint_support import assembled
from deepspeed_support import run_ranks
from weights import copy_of_weights, flip_bit, model_folder, overwrite

TENSORS: dict[str, torch.Tensor] = {
    "matrix": torch.arange(12.0).view(3, 4),
    "bf16": torch.arange(7.0).bfloat16(),
    "half": torch.full((2, 2), 3.0).half(),
    "fp8": torch.arange(5.0).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(7.0, dtype=torch.float64),
    "integers": torch.arange(3),
    "empty": torch.zeros(0, 4),
}


def kinds(path: Path) -> list[str]:
    """Returns what a scan finds in a path."""
    return [finding.kind for finding in ng.scan(path).findings]


def only(path: Path) -> Finding:
    """Returns the one thing that a scan finds."""
    (finding,) = ng.scan(path).findings
    assert finding.severity == "error"
    assert finding.remedy
    return finding


def same(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    parts = [one.contiguous().flatten().view(torch.uint8) for one in (tensor, other)]
    return tensor.dtype == other.dtype and tensor.shape == other.shape and torch.equal(*parts)


def save_torch(path: Path) -> Path:
    torch.save(TENSORS, path)
    return path


def save_legacy(path: Path) -> Path:
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    return path


def save_safetensors(path: Path) -> Path:
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


SAVERS = {"weights.pt": save_torch, "legacy.pth": save_legacy, "weights.safetensors": save_safetensors}


@pytest.mark.parametrize("name", SAVERS)
def test_every_tensor_is_found_as_it_was_saved(tmp_path: Path, name: str) -> None:
    source = open_source(SAVERS[name](tmp_path / name))
    assert source.findings == ()
    assert {entry.name for entry in source.entries} == TENSORS.keys()
    for entry in source.entries:
        assert same(load(entry), TENSORS[entry.name]), entry.name
    assert ng.scan(tmp_path / name).ok


def test_nested_containers_parameters_and_views_of_torch_files(tmp_path: Path) -> None:
    flat = torch.arange(20.0)
    value = {
        "model": OrderedDict(weight=nn.Parameter(flat[4:16].view(3, 4).t()), step=torch.tensor(3.0)),
        "list": [flat[::2]],
        "epoch": 3,
    }
    torch.save(value, tmp_path / "a.ckpt")
    source = open_source(tmp_path / "a.ckpt")
    found = {entry.name: entry for entry in source.entries}
    assert torch.equal(load(found["model.weight"]), flat[4:16].view(3, 4).t())
    assert torch.equal(load(found["list.0"]), flat[::2])
    assert found["model.step"].role == "step"
    assert found["model.weight"].index_of(6) == (2, 1)  # of the element 10
    assert source.metadata == {"epoch": 3}


def test_a_loaded_tensor_can_be_written_to_without_changing_the_file(tmp_path: Path) -> None:
    path = save_safetensors(tmp_path / "a.safetensors")
    before = path.read_bytes()
    entry = next(entry for entry in open_source(path).entries if entry.name == "matrix")
    load(entry).fill_(7)
    assert path.read_bytes() == before


def test_metadata_of_safetensors(tmp_path: Path) -> None:
    assert open_source(save_safetensors(tmp_path / "a.safetensors")).metadata == {"format": "pt"}


@pytest.mark.parametrize("name", SAVERS)
def test_a_file_that_is_cut_off_anywhere_is_reported(tmp_path: Path, name: str) -> None:
    data = SAVERS[name](tmp_path / name).read_bytes()
    path = tmp_path / f"cut{Path(name).suffix}"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        source = open_source(path)
        assert source.findings, size
        assert source.findings[0].file == str(path)
        assert source.findings[0].remedy


@pytest.mark.slow
@pytest.mark.parametrize("name", SAVERS)
def test_a_byte_that_is_changed_anywhere_never_breaks_a_reader(tmp_path: Path, name: str) -> None:
    data = SAVERS[name](tmp_path / name).read_bytes()
    path = tmp_path / f"changed{Path(name).suffix}"
    randomly = random.Random(0)
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << randomly.randrange(8)
        path.write_bytes(changed)
        ng.scan(path)


def test_a_bit_that_flips_in_any_record_of_a_torch_file_is_found(tmp_path: Path) -> None:
    path = save_torch(tmp_path / "a.pt")
    entries = [entry for entry in open_source(path).entries if entry.nbytes]
    for entry in entries:
        for place in range(entry.offset, entry.offset + entry.nbytes):
            flip_bit(path, place, 3)
            assert "checksum" in kinds(path), entry.name
            flip_bit(path, place, 3)
    assert ng.scan(path).ok


def test_checksums_that_were_not_computed_are_not_missed(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = save_torch(tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert open_source(path).checksums == ()
    assert ng.scan(path).ok


def header(**tensors: Any) -> bytes:
    """Returns a safetensors file with this header and 32 bytes of data."""
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + bytes(range(32))


def piece(begin: int, end: int, size: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [size], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(4096),
        b"\xff" * 64,
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 5) + b"[[[[[",
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        header(a=piece(0, 16, 4), b=piece(8, 32, 6)),
        header(a=piece(0, 8, 2), b=piece(16, 32, 4)),
        header(a=piece(0, 32, 1000)),
        header(a=piece(0, 16, 4)),
        header(a=piece(0, 1 << 60, 1 << 58)),
        header(a=piece(-8, 32, 10)),
        header(a={"dtype": "F32", "shape": [8]}),
        header(a=7),
    ],
)
def test_bad_headers_of_safetensors(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    finding = only(path)
    assert finding.kind == "damaged_file"
    assert finding.file == str(path)


def test_the_tail_of_a_file_that_was_never_written_is_reported(tmp_path: Path) -> None:
    path = copy_of_weights(tmp_path)
    size = path.stat().st_size
    begin = size * 3 // 4 // 4096 * 4096
    overwrite(path, begin, bytes(size - begin))
    found = kinds(path)
    assert "zero_pages" in found
    assert "all_zero" in found


class Runs:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "system"), (eval, "builtins.eval"), (exec, "builtins.exec"), (os.remove, "remove")],
)
def test_code_in_a_pickle_is_named_and_does_not_run(tmp_path: Path, function: Callable[..., Any], name: str) -> None:
    marker = tmp_path / "marker"
    marker.touch()
    argument = {os.system: f"rm {marker}", os.remove: str(marker)}.get(
        function, f"__import__('os').remove({str(marker)!r})"
    )
    torch.save({"weight": torch.ones(3), "more": Runs(function, argument)}, tmp_path / "a.pt")
    finding = only(tmp_path / "a.pt")
    assert finding.kind == "code"
    assert name in finding.message
    assert marker.exists()
    assert [entry.name for entry in open_source(tmp_path / "a.pt").entries] == ["weight"]


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
    copy = inert(unpickle(push(*made, *linked, b"h\x00")).value)
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
    test_every_tensor_is_found_as_it_was_saved(tmp_path, "weights.pt")


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


def rewritten(path: Path, target: Path, compression: int = zipfile.ZIP_STORED, **records: bytes) -> Path:
    """Returns a copy of a torch file with other records."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, records.pop(name.partition("/")[2].replace("/", "_").replace(".", "_"), old.read(name)))
        for name, data in records.items():
            new.writestr(name.replace("__", "/"), data)
    return target


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    bomb = rewritten(save_torch(tmp_path / "a.pt"), tmp_path / "b.pt", zipfile.ZIP_DEFLATED, data_0=bytes(100 << 20))
    assert bomb.stat().st_size < 1 << 20
    assert only(bomb).kind == "zip_bomb"


def test_records_that_lie_over_each_other_are_refused(tmp_path: Path) -> None:
    path = rewritten(save_torch(tmp_path / "a.pt"), tmp_path / "b.pt", data_0=bytes(1 << 16))
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\x01\x02")
    first = struct.unpack_from("<I", data, data.index(b"PK\x01\x02", data.index(b"data/0", directory) - 46) + 42)[0]
    for _ in range(4):  # four records of 64 KiB, all at the place of one
        directory = data.index(b"PK\x01\x02", directory + 4)
        struct.pack_into("<II", data, directory + 20, 1 << 16, 1 << 16)
        struct.pack_into("<I", data, directory + 42, first)
    path.write_bytes(data)
    assert kinds(path)[0] in ("zip_bomb", "damaged_file")


def test_a_record_that_is_too_short_for_its_tensor_is_reported(tmp_path: Path) -> None:
    path = rewritten(save_torch(tmp_path / "a.pt"), tmp_path / "b.pt", data_0=b"\0" * 8)
    finding = only(path)
    assert "matrix" in finding.message
    assert "8 bytes" in finding.message


def test_a_record_that_is_missing_is_reported(tmp_path: Path) -> None:
    path = save_torch(tmp_path / "a.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for name in old.namelist():
            if not name.endswith("data/0"):
                new.writestr(name, old.read(name))
    assert "lacks the data of matrix" in only(tmp_path / "b.pt").message


class Doubled(nn.Module):
    """No Linear: DeepSpeed's stage 3 puts another one into torch, which cannot be scripted, and leaves it there."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x


def test_torchscript_is_named_and_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(Doubled()), str(tmp_path / "a.pt"))
    assert only(tmp_path / "a.pt").kind == "torchscript"


def test_a_bare_pickle_is_named_and_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"a": 1}))
    assert only(tmp_path / "a.pt").kind == "bare_pickle"


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "pytorch_model.bin"])
def test_a_pipe_in_the_place_of_a_file_does_not_hang(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert "no regular file" in only(tmp_path / name).message


def test_what_no_reader_knows_could_not_be_checked(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    for path in (tmp_path / "notes.txt", tmp_path, tmp_path / "nothing"):
        with pytest.raises(UnknownLayout):
            open_source(path)
        report = ng.scan(path)
        assert report.exit_code == 2
        assert str(path) in report.unchecked[0]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder of two shards and their index."""
    folder = tmp_path / "model"
    folder.mkdir()
    shards = {"model-1.safetensors": ["matrix", "bf16"], "model-2.safetensors": ["half", "fp8"]}
    for name, tensors in shards.items():
        save_file({tensor: TENSORS[tensor] for tensor in tensors}, folder / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))
    return folder


def edit_index(model: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = model / "model.safetensors.index.json"
    document = json.loads(path.read_text())
    change(document["weight_map"])
    path.write_text(json.dumps(document))


def test_a_sharded_model_is_read_with_its_config(model: Path) -> None:
    source = open_source(model)
    assert {entry.name for entry in source.entries} == {"matrix", "bf16", "half", "fp8"}
    assert source.metadata["dtype"] == "bfloat16"
    assert source.layout == "safetensors"
    assert ng.scan(model).ok


def test_the_config_says_what_weights_must_fit_into(model: Path) -> None:
    save_file({"matrix": torch.tensor([[1.0, 1e6]]), "bf16": TENSORS["bf16"]}, model / "model-1.safetensors")
    assert ng.scan(model).ok
    (model / "config.json").write_text(json.dumps({"dtype": "float16"}))
    assert only(model).kind == "unholdable"
    assert ng.scan(model, dtype="bfloat16").ok


def test_a_shard_that_is_missing(model: Path) -> None:
    (model / "model-2.safetensors").unlink()
    assert only(model).kind == "missing_shard"


def test_all_shards_missing(model: Path) -> None:
    for shard in model.glob("*.safetensors"):
        shard.unlink()
    assert kinds(model) == ["missing_shard", "missing_shard"]


def test_a_pipe_in_the_place_of_an_index_does_not_hang(model: Path) -> None:
    (model / "model.safetensors.index.json").unlink()
    os.mkfifo(model / "model.safetensors.index.json")
    assert "no regular file" in only(model).message


def test_a_shard_that_is_empty(model: Path) -> None:
    (model / "model-2.safetensors").write_bytes(b"")
    assert "0 bytes" in only(model).message


def test_a_tensor_of_the_index_that_is_in_no_shard(model: Path) -> None:
    edit_index(model, lambda names: names.update(lost="model-1.safetensors"))
    assert (only(model).kind, only(model).name) == ("missing_tensor", "lost")


def test_a_tensor_in_a_shard_that_the_index_does_not_know(model: Path) -> None:
    edit_index(model, lambda names: names.pop("half"))
    assert (only(model).kind, only(model).name) == ("extra_tensor", "half")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", ".."])
def test_an_index_that_leads_out_of_the_folder(model: Path, name: str) -> None:
    edit_index(model, lambda names: names.update(matrix=name, bf16=name))
    assert "escape" in kinds(model)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 100_000])
def test_an_index_that_is_damaged(model: Path, text: str) -> None:
    (model / "model.safetensors.index.json").write_text(text)
    assert only(model).kind == "damaged_file"


def test_a_link_that_leads_out_of_the_folder(model: Path, tmp_path: Path) -> None:
    shutil.move(model / "model-2.safetensors", tmp_path / "elsewhere.safetensors")
    (model / "model-2.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert kinds(model) == ["escape"]


def test_the_links_of_the_hub_cache_are_followed(model: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in model.iterdir():
        shutil.move(file, blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert ng.scan(snapshot).ok
    assert len(open_source(snapshot).entries) == 4


def test_a_loop_of_links_is_reported(model: Path) -> None:
    (model / "more.safetensors").symlink_to("more.safetensors")
    assert len(kinds(model)) == 1


def test_a_model_folder_from_the_hub_is_clean() -> None:
    assert ng.scan(model_folder()).ok


def test_an_accelerate_folder_is_read_whole(tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.backward(model(torch.randn(2, 4)).square().sum())
    optimizer.step()
    accelerator.save_state(str(tmp_path / "state"))
    source = open_source(tmp_path / "state")
    assert source.layout == "safetensors, torch"
    assert {"parameter", "exp_avg", "exp_avg_sq", "step"} <= {entry.role for entry in source.entries}
    assert ng.scan(tmp_path / "state").ok


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint that two processes have saved, of tensors that lie on both."""
    folder = tmp_path_factory.mktemp("dcp")
    script = f"""
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
whole = {{"rows": torch.randn(7, 5), "columns": torch.randn(4, 6), "same": torch.randn(3)}}
places = {{"rows": Shard(0), "columns": Shard(1), "same": Replicate()}}
state = {{name: distribute_tensor(tensor, mesh, [places[name]]) for name, tensor in whole.items()}}
dcp.save({{"model": state, "epoch": 3}}, checkpoint_id={str(folder / "saved")!r})
if dist.get_rank() == 0:
    torch.save(whole, {str(folder / "truth.pt")!r})
dist.destroy_process_group()
"""
    run_ranks(script, folder)
    return folder / "saved", torch.load(folder / "truth.pt", weights_only=True)


def blocks(source: Source) -> dict[str, torch.Tensor]:
    """Returns whole tensors, put together from blocks."""
    found: dict[str, torch.Tensor] = {}
    for entry in source.entries:
        corner = entry.corner or (0,) * len(entry.shape)
        target = found.setdefault(entry.name, torch.full(entry.whole_shape, float("nan")))
        target[tuple(slice(at, at + size) for at, size in zip(corner, entry.shape, strict=True))] = load(entry)
    return found


def test_blocks_of_a_distributed_checkpoint(sharded: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, truth = sharded
    source = open_source(folder)
    assert source.findings == ()
    found = blocks(source)
    assert found.keys() == {f"model.{name}" for name in truth}
    for name, tensor in truth.items():
        assert torch.equal(found[f"model.{name}"], tensor)
    assert ng.scan(folder).ok


def test_a_nan_in_a_block_has_its_index_in_the_whole_tensor(
    sharded: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder = shutil.copytree(sharded[0], tmp_path / "copy")
    entries = [entry for entry in open_source(folder).entries if entry.name == "model.columns"]
    entry: TensorEntry = next(entry for entry in entries if entry.corner == (0, 3))
    overwrite(entry.file, entry.offset + 4 * 4, struct.pack("<f", float("nan")))
    offender = next(finding.offender for finding in ng.scan(folder).findings if finding.offender)
    assert offender.index == (1, 4)
    assert offender.shape == (4, 6)


def test_a_missing_file_of_a_distributed_checkpoint(
    sharded: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder = shutil.copytree(sharded[0], tmp_path / "copy")
    (folder / "__1_0.distcp").unlink()
    assert only(folder).kind == "missing_shard"


@pytest.mark.parametrize("data", [b"", bytes(100), pickle.dumps(3), pickle.dumps(Runs(os.system, "false"))])
def test_a_damaged_index_of_a_distributed_checkpoint(
    sharded: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, data: bytes
) -> None:
    folder = shutil.copytree(sharded[0], tmp_path / "copy")
    (folder / ".metadata").write_bytes(data)
    assert only(folder).kind == "damaged_file"


def test_a_distributed_checkpoint_of_one_process(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "one")
    found = assembled(open_source(tmp_path / "one"), "parameter")
    assert torch.equal(found["model.weight"], model.weight)


def test_bytes_that_safetensors_wrote_in_memory_are_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(save({"a": torch.ones(3)}))
    assert ng.scan(tmp_path / "a.safetensors").ok


def member_of(module: str, cls: str, name: str) -> bytes:
    """A member of an enumeration as Python 3.11.0 to 3.11.3 pickles it: by getattr."""
    return f"cbuiltins\ngetattr\n(c{module}\n{cls}\nV{name}\ntR.".encode()


def test_a_member_of_a_known_enumeration_is_no_code_and_that_of_anything_else_is() -> None:
    stage = unpickle(member_of("deepspeed.runtime.zero.config", "ZeroStageEnum", "gradients"))
    assert stage.value.args == ("gradients",)
    assert "builtins.getattr" not in stage.foreign
    assert "builtins.getattr" in unpickle(member_of("deepspeed.runtime.zero.config", "os", "system")).foreign
    assert "builtins.getattr" in unpickle(member_of("builtins", "dict", "fromkeys")).foreign
