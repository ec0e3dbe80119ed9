"""Checkpoints saved by real engines, and the values that the engines report for them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

import hallo_numguard as ng
from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats import Source, TensorEntry, load

from deepspeed_support import run_ranks

KINDS = {
    "stage0-fp16": ("fp16", 0, False),
    "stage0-fp32": ("fp32", 0, False),
    "stage1-bf16_fp32": ("bf16_fp32", 1, False),
    "stage1-bf16": ("bf16", 1, False),
    "stage2-fp16": ("fp16", 2, False),
    "stage2-half": ("half", 2, False),
    "stage2-offload": ("fp16", 2, True),
    "stage3-fp16": ("fp16", 3, False),
    "stage3-offload": ("bf16", 3, True),
}

_SCRIPT = """
import json, os
import torch
from deepspeed_support import make_engine, train_step
import deepspeed.comm as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

kinds, folder = json.loads({arguments!r})
for kind, (setup, stage, offload) in kinds.items():
    engine = make_engine(setup, stage=stage, offload=offload)
    for step in range(2):
        train_step(engine, step)
    engine.save_checkpoint(os.path.join(folder, kind), client_state={{"epoch": 3}})
    truth = {{}}
    if stage > 0:
        for name, parameter in engine.module.named_parameters():
            if parameter.requires_grad:
                truth[f"{{name}} fp32"] = safe_get_full_fp32_param(parameter)
                for key in ("exp_avg", "exp_avg_sq"):
                    truth[f"{{name}} {{key}}"] = safe_get_full_optimizer_state(parameter, key)
    if dist.get_rank() == 0:
        torch.save({{key: value.clone() for key, value in truth.items()}}, os.path.join(folder, kind + ".truth"))
    engine.destroy()
"""


def save_checkpoints(folder: Path, ranks: int, kinds: Mapping[str, tuple[str, int, bool]]) -> Path:
    """Saves a checkpoint of each kind with a number of processes, into folders named after the kinds."""
    run_ranks(_SCRIPT.format(arguments=json.dumps([dict(kinds), str(folder)])), folder, ranks)
    return folder


def assembled(source: Source, role: str) -> dict[str, torch.Tensor]:
    """Returns whole tensors, assembled from the pieces of all ranks."""
    whole: dict[str, torch.Tensor] = {}
    for entry in source.entries:
        if entry.role == role and not entry.name.startswith("param_groups"):
            shape = entry.whole_shape
            target = whole.setdefault(entry.name, torch.full((math.prod(shape),), float("nan")).view(shape))
            piece = load(entry).flatten()
            target.view(-1)[entry.start : entry.start + entry.numel] = piece.to(target.dtype)
    return whole


def copied(folder: Path, to: Path) -> Path:
    """Returns a copy of a checkpoint that a test may damage."""
    return Path(shutil.copytree(folder, to / folder.name))


def find(source: Source, name: str, role: str, rank: int | None = None) -> TensorEntry:
    """Returns the entry of a tensor."""
    return next(e for e in source.entries if (e.name, e.role) == (name, role) and rank in (None, e.rank))


def only_error(path: Path) -> Finding:
    """Returns the one finding of a scan, an error with a remedy."""
    (finding,) = ng.scan(path).findings
    assert finding.severity == "error"
    assert finding.remedy
    return finding
