"""Fuzzes every reader with atheris: any exception, hang or growth of memory is a bug.

    python tests/fuzz/fuzz_readers.py pickle|safetensors|torch|legacy|distributed|deepspeed|index [--seconds 60]

Inputs are whole files, mutated from real ones. Checksums are not corrected: readers must not rely on them.
"""

from __future__ import annotations

import json
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["hallo_numguard.files", "zipfile", "pickletools"]):
    import hallo_numguard as ng
    from hallo_numguard.files.formats import DamagedFile
    from hallo_numguard.files.formats.pickles import plain, unpickle

import click
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save

MAX_MEMORY_MIB = 4096  # of the whole process, torch included
MAX_SECONDS = 5  # for one input
TENSORS = {"a.weight": torch.ones(3, 2), "b": torch.zeros(2).half(), "c": torch.arange(3)}
STATE = {
    "module": {"a.weight": torch.ones(3, 2)},
    "buffer_names": ["b"],
    "param_shapes": [{"a.weight": (3, 2)}],
    "dp_world_size": 1,
    "ds_config": {"fp16": {"enabled": True}},
    "optimizer": {"optimizer_state_dict": {"state": {0: {"exp_avg": torch.ones(3, 2)}}}, "fp32_groups": [[]]},
}
SHARD = {
    "optimizer_state_dict": {
        "zero_stage": 2,
        "partition_count": [1],
        "loss_scaler": None,
        "single_partition_of_fp32_groups": [torch.ones(6)],
        "base_optimizer_state": {"state": {0: {"exp_avg": torch.ones(6)}}, "param_groups": [{"lr": 0.1}]},
    }
}
FOLDER = Path(tempfile.mkdtemp())


def scan_as(name: str) -> Callable[[bytes], None]:
    """Returns a function that writes bytes into a file of the folder and scans the folder."""

    def scan(data: bytes) -> None:
        (FOLDER / name).write_bytes(data)
        ng.scan(FOLDER, threads=1).to_dict()

    return scan


def load_pickle(data: bytes) -> None:
    """Unpickles bytes, and copies the result as metadata."""
    try:
        plain(unpickle(data).value)
    except DamagedFile:
        return


def saved(value: object, legacy: bool = False) -> bytes:
    """Returns the bytes that torch.save writes."""
    path = FOLDER.parent / f"{FOLDER.name}.pt"
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path.read_bytes()


def prepare(kind: str) -> tuple[Callable[[bytes], None], list[bytes]]:
    """Returns the function to fuzz, and the first inputs."""
    if kind == "pickle":
        return load_pickle, [pickle.dumps({"a": [1, (2.0, "x")], "b": {3: None}}, protocol=p) for p in range(5)]
    if kind == "safetensors":
        return scan_as("model.safetensors"), [save(TENSORS, {"format": "pt"})]
    if kind == "torch":
        return scan_as("model.pt"), [saved(TENSORS)]
    if kind == "legacy":
        return scan_as("model.pt"), [saved(TENSORS, legacy=True)]
    if kind == "distributed":
        dcp.save({"model": TENSORS}, checkpoint_id=FOLDER, no_dist=True)
        return scan_as(".metadata"), [(FOLDER / ".metadata").read_bytes()]
    if kind == "deepspeed":
        (FOLDER / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(saved(SHARD))
        return scan_as("mp_rank_00_model_states.pt"), [saved(STATE)]
    (FOLDER / "model-1.safetensors").write_bytes(save(TENSORS))
    index = {"weight_map": dict.fromkeys(TENSORS, "model-1.safetensors")}
    return scan_as("model.safetensors.index.json"), [json.dumps(index).encode()]


@click.command()
@click.argument(
    "kind", type=click.Choice(["pickle", "safetensors", "torch", "legacy", "distributed", "deepspeed", "index"])
)
@click.option("--seconds", type=click.IntRange(min=1), default=60, show_default=True)
def main(kind: str, seconds: int) -> None:
    """Fuzzes one reader. Stops at the first bug and keeps the input that shows it."""
    target, seeds = prepare(kind)
    corpus = FOLDER.parent / f"{FOLDER.name}.corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
    limits = [
        f"-max_total_time={seconds}",
        f"-timeout={MAX_SECONDS}",
        f"-rss_limit_mb={MAX_MEMORY_MIB}",
        "-max_len=8192",
    ]
    atheris.Setup([sys.argv[0], *limits, str(corpus)], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
