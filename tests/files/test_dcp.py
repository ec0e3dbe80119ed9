"""Checkpoints of torch.distributed.checkpoint."""

from __future__ import annotations

import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import hallo_numguard as ng
from hallo_numguard.files.formats import Source, TensorEntry, load, open_source

from checkpoint_support import assembled, only_error
from deepspeed_support import run_ranks
from weights import overwrite


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
    assert only_error(folder).kind == "missing_shard"


@pytest.mark.parametrize("data", [b"", bytes(100), pickle.dumps(3), b"cos\nsystem\n(Vfalse\ntR."])
def test_a_damaged_index_of_a_distributed_checkpoint(
    sharded: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, data: bytes
) -> None:
    folder = shutil.copytree(sharded[0], tmp_path / "copy")
    (folder / ".metadata").write_bytes(data)
    assert only_error(folder).kind == "damaged_file"


def test_a_distributed_checkpoint_of_one_process(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "one")
    found = assembled(open_source(tmp_path / "one"), "parameter")
    assert torch.equal(found["model.weight"], model.weight)
