"""Readers of files and folders: what they find in intact ones, and what they say of damaged and of hostile ones."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hallo_numguard as ng
from hallo_numguard.files.formats import UnknownLayout, load, open_source

from checkpoint_support import only_error
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
    assert source.metadata["epoch"] == 3


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
    finding = only_error(path)
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
    finding = only_error(tmp_path / "a.pt")
    assert finding.kind == "code"
    assert name in finding.message
    assert marker.exists()
    assert [entry.name for entry in open_source(tmp_path / "a.pt").entries] == ["weight"]


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
    assert only_error(bomb).kind == "zip_bomb"


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
    finding = only_error(path)
    assert "matrix" in finding.message
    assert "8 bytes" in finding.message


def test_a_record_that_is_missing_is_reported(tmp_path: Path) -> None:
    path = save_torch(tmp_path / "a.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for name in old.namelist():
            if not name.endswith("data/0"):
                new.writestr(name, old.read(name))
    assert "lacks the data of matrix" in only_error(tmp_path / "b.pt").message


class Doubled(nn.Module):
    """No Linear: DeepSpeed's stage 3 puts another one into torch, which cannot be scripted, and leaves it there."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x


def test_torchscript_is_listed_as_not_read(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(Doubled()), str(tmp_path / "a.pt"))
    report = ng.scan(tmp_path / "a.pt")
    assert (report.findings, report.exit_code) == ((), 2)
    assert "TorchScript" in report.unchecked[0]
    torch.save({"weight": torch.ones(3)}, tmp_path / "b.pt")
    beside = ng.scan(tmp_path)
    assert beside.exit_code == 0
    assert "TorchScript" in beside.not_read[0]


def test_a_bare_pickle_is_named_and_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"a": 1}))
    assert only_error(tmp_path / "a.pt").kind == "bare_pickle"


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "pytorch_model.bin"])
def test_a_pipe_in_the_place_of_a_file_does_not_hang(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert "no regular file" in only_error(tmp_path / name).message


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
    assert only_error(model).kind == "overflows_dtype"
    assert ng.scan(model, dtype="bfloat16").ok


def lose_shard(model: Path) -> None:
    (model / "model-2.safetensors").unlink()


def lose_all_shards(model: Path) -> None:
    for shard in model.glob("*.safetensors"):
        shard.unlink()


def empty_shard(model: Path) -> None:
    (model / "model-2.safetensors").write_bytes(b"")


def pipe_as_index(model: Path) -> None:
    (model / "model.safetensors.index.json").unlink()
    os.mkfifo(model / "model.safetensors.index.json")


def name_tensor_in_no_shard(model: Path) -> None:
    edit_index(model, lambda names: names.update(lost="model-1.safetensors"))


def forget_tensor(model: Path) -> None:
    edit_index(model, lambda names: names.pop("half"))


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lose_shard, [("missing_shard", "", "")]),
        (lose_all_shards, [("missing_shard", "", "2 of 2 shards")]),
        (empty_shard, [("damaged_file", "", "0 bytes")]),
        (pipe_as_index, [("damaged_file", "", "no regular file")]),
        (name_tensor_in_no_shard, [("missing_tensor", "lost", "")]),
        (forget_tensor, [("extra_tensor", "half", "")]),
    ],
)
def test_shards_and_index_that_disagree(
    model: Path, damage: Callable[[Path], None], found: list[tuple[str, str, str]]
) -> None:
    damage(model)
    for finding, (kind, name, words) in zip(ng.scan(model).findings, found, strict=True):
        assert (finding.kind, finding.name, finding.severity) == (kind, name, "error")
        assert words in finding.message
        assert finding.remedy


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", ".."])
def test_an_index_that_leads_out_of_the_folder(model: Path, name: str) -> None:
    edit_index(model, lambda names: names.update(matrix=name, bf16=name))
    assert "escape" in kinds(model)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 100_000])
def test_an_index_that_is_damaged(model: Path, text: str) -> None:
    (model / "model.safetensors.index.json").write_text(text)
    assert only_error(model).kind == "damaged_file"


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
