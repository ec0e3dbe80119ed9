"""Checkpoints that real engines have saved, in one and in two processes, read without DeepSpeed."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hallo_numguard as ng
from hallo_numguard.files.formats import open_source

from checkpoint_support import KINDS, assembled, copied, find, save_checkpoints
from weights import overwrite

pytestmark = pytest.mark.deepspeed

SHARDED = [kind for kind in KINDS if not kind.startswith("stage0")]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoints(tmp_path_factory.mktemp("two"), 2, KINDS)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoints(tmp_path_factory.mktemp("one"), 1, {"stage2-fp16": KINDS["stage2-fp16"]})


@pytest.mark.parametrize("kind", SHARDED)
def test_pieces_make_up_what_the_engine_held(two_ranks: Path, kind: str) -> None:
    source = open_source(two_ranks / kind)
    truth = torch.load(two_ranks / f"{kind}.truth", weights_only=True)
    assert len(truth) == 3 * 7
    found = {
        f"{name} {role}": t for role in ("fp32", "exp_avg", "exp_avg_sq") for name, t in assembled(source, role).items()
    }
    assert found.keys() == truth.keys()
    for name, tensor in truth.items():
        assert torch.equal(found[name], tensor.float()), name


@pytest.mark.parametrize("kind", KINDS)
def test_intact_checkpoints_are_clean(two_ranks: Path, kind: str) -> None:
    report = ng.scan(two_ranks / kind)
    assert report.ok
    assert {finding.severity for finding in report.findings} <= {"info"}  # the mask


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_files_say_of_the_run(two_ranks: Path, kind: str) -> None:
    setup, stage, _ = KINDS[kind]
    source = open_source(two_ranks / kind)
    facts = source.metadata
    assert source.layout == f"deepspeed zero-{stage}"
    assert facts["dp_world_size"] == 2
    assert facts["mp_world_size"] == 1
    assert facts["zero_stage"] == stage
    assert facts["dtype"] == {"fp16": "float16", "half": "float16", "fp32": "float32"}.get(setup, "bfloat16")
    assert facts["global_steps"] == 2
    assert facts["tag"] == "global_step2"
    assert facts["client_state"]["epoch"] == 3
    assert facts["param_groups"][0]["lr"] == 1e-3
    assert facts["ds_config"]["train_micro_batch_size_per_gpu"] == 4
    if stage > 0:
        assert facts["partition_count"] == 2
        assert facts["optimizer_files"] == 2
    if setup in ("fp16", "half"):
        assert facts["loss_scaler"]["cur_scale"] == 256
        assert facts["loss_scaler"]["dynamic"] is True


@pytest.mark.parametrize("kind", ["stage0-fp16", "stage0-fp32"])
def test_states_of_stage_0_have_the_names_of_their_parameters(two_ranks: Path, kind: str) -> None:
    names = {entry.name for entry in open_source(two_ranks / kind).entries if entry.role == "exp_avg"}
    hidden = {"hidden.weight", "hidden.bias", "norm.weight", "norm.bias"}
    assert names == {"embedding.weight", "output.weight", "output.bias", *hidden}


@pytest.mark.parametrize("kind", SHARDED)
def test_a_nan_in_a_partition_is_named_with_its_parameter_index_and_rank(
    two_ranks: Path, tmp_path: Path, kind: str
) -> None:
    folder = copied(two_ranks / kind, tmp_path)
    entry = find(open_source(folder), "output.weight", "exp_avg_sq", rank=1)
    overwrite(entry.file, entry.offset + 4 * 5, struct.pack("<f", float("nan")))
    findings = [finding for finding in ng.scan(folder).findings if finding.severity == "error"]
    offender = next(finding.offender for finding in findings if finding.kind == "nonfinite")
    assert offender is not None
    assert (offender.name, offender.rank, offender.kind) == ("exp_avg_sq of output.weight", 1, "optimizer_state")
    assert offender.index == divmod(entry.start + 5, 24)
    assert {finding.kind for finding in findings} == {"nonfinite", "checksum"}
    assert {finding.file for finding in findings} == {str(entry.file)}


@pytest.mark.parametrize("kind", ["stage2-fp16", "stage3-fp16"])
def test_a_missing_rank_is_named(two_ranks: Path, tmp_path: Path, kind: str) -> None:
    folder = copied(two_ranks / kind, tmp_path)
    next(folder.glob("*/*zero_pp_rank_1_*optim_states.pt")).unlink()
    (finding,) = (finding for finding in ng.scan(folder).findings if finding.severity == "error")
    assert finding.kind == "missing_shard"
    assert "rank 1 is missing: 2 ranks" in finding.message


def test_a_missing_model_state_of_a_rank_is_named(two_ranks: Path, tmp_path: Path) -> None:
    folder = copied(two_ranks / "stage3-fp16", tmp_path)
    next(folder.glob("*/*zero_pp_rank_1_*model_states.pt")).unlink()
    messages = [finding.message for finding in ng.scan(folder).findings if finding.kind == "missing_shard"]
    assert ["the model state of rank 1 is missing" in message for message in messages] == [True]


@pytest.mark.parametrize(("kind", "found"), [("stage2-fp16", "other_masters"), ("stage3-fp16", "other_rank")])
def test_an_optimizer_file_that_is_a_copy_of_another_rank_s_is_found(
    two_ranks: Path, tmp_path: Path, kind: str, found: str
) -> None:
    folder = copied(two_ranks / kind, tmp_path)
    (own,) = folder.glob("*/*zero_pp_rank_1_*optim_states.pt")
    (other,) = folder.glob("*/*zero_pp_rank_0_*optim_states.pt")
    shutil.copy(other, own)
    assert found in {finding.kind for finding in ng.scan(folder).findings}


@pytest.mark.parametrize("tag", ["global_step9", "../elsewhere", "/etc", "", "a\0b"])
def test_latest_that_points_to_nothing_whole_is_reported(two_ranks: Path, tmp_path: Path, tag: str) -> None:
    folder = copied(two_ranks / "stage2-fp16", tmp_path)
    (folder / "latest").write_text(tag)
    (finding,) = (finding for finding in ng.scan(folder).findings if finding.severity == "error")
    assert finding.kind in ("missing", "escape")
    assert finding.file == str(folder / "latest")


def test_an_empty_shard_is_reported(two_ranks: Path, tmp_path: Path) -> None:
    folder = copied(two_ranks / "stage3-fp16", tmp_path)
    shard = next(folder.glob("*/*rank_0*optim_states.pt"))
    shard.write_bytes(b"")
    assert [finding.message for finding in ng.scan(folder).findings if finding.file == str(shard)] == [
        f"{shard.relative_to(folder)}: is empty (0 bytes)"
    ]


def test_a_universal_checkpoint_has_the_same_values(one_rank: Path, tmp_path: Path) -> None:
    tag = next((one_rank / "stage2-fp16").glob("global_step*"))
    arguments = ["--input_folder", str(tag), "--output_folder", str(tmp_path / f"{tag.name}_universal")]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]
    code = "import sys; from deepspeed.checkpoint.ds_to_universal import main, parse_arguments; main(parse_arguments())"
    subprocess.run([sys.executable, "-c", code, *arguments, *workers], check=True, capture_output=True)
    source = open_source(tmp_path)
    assert source.layout == "deepspeed universal"
    assert source.findings == ()
    truth = torch.load(one_rank / "stage2-fp16.truth", weights_only=True)
    for role in ("fp32", "exp_avg", "exp_avg_sq"):
        for name, tensor in assembled(source, role).items():
            if f"{name} {role}" in truth:
                assert torch.equal(tensor, truth[f"{name} {role}"].float())
    assert len(assembled(source, "exp_avg")) == 7
    assert ng.scan(tmp_path).ok


def test_deepspeed_is_not_imported(one_rank: Path) -> None:
    code = f"""
import sys
import hallo_numguard
assert hallo_numguard.scan({str(one_rank / "stage2-fp16")!r}).ok
assert not [name for name in sys.modules if name.startswith("deepspeed")]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", ["stage1-bf16", "stage2-fp16", "stage3-fp16"])
def test_a_manifest_names_the_parameter_and_the_rank_that_was_changed(
    two_ranks: Path, tmp_path: Path, kind: str
) -> None:
    folder = copied(two_ranks / kind, tmp_path)
    assert ng.write_manifest(folder).ok
    assert ng.verify_manifest(folder).ok
    entry = find(open_source(folder), "hidden.weight", "exp_avg", rank=1)
    overwrite(entry.file, entry.offset + 8, struct.pack("<f", 3e4))
    (finding,) = (found for found in ng.verify_manifest(folder).findings if found.kind == "changed_tensor")
    assert finding.name == "hidden.weight"
    assert "exp_avg of hidden.weight (rank 1) holds other values" in finding.message
    assert "and 30000 now" in finding.message


def test_checkpoints_are_compared_by_whole_tensors(two_ranks: Path, tmp_path: Path) -> None:
    folder = copied(two_ranks / "stage2-fp16", tmp_path)
    assert ng.diff(two_ranks / "stage2-fp16", folder).ok
    entry = find(open_source(folder), "hidden.weight", "fp32", rank=1)
    overwrite(entry.file, entry.offset + 8, struct.pack("<f", 3e4))
    (finding,) = ng.diff(two_ranks / "stage2-fp16", folder).findings
    assert "fp32 of hidden.weight differs in 1 of " in finding.message
    entry.file.unlink()
    assert "not whole" in " ".join(finding.message for finding in ng.diff(two_ranks / "stage2-fp16", folder).findings)


def test_checkpoints_of_one_and_of_two_ranks_have_the_same_tensors(one_rank: Path, two_ranks: Path) -> None:
    report = ng.diff(one_rank / "stage2-fp16", two_ranks / "stage2-fp16")
    kinds = {finding.kind for finding in report.findings if "rank 1" not in finding.message}
    assert kinds == {"values_differ"}  # two ranks were given twice as many samples
    assert len([finding for finding in report.findings if finding.message.startswith("fp32 of ")]) == 7


def test_preflight_compares_ranks_with_the_run_and_finds_that_one_file_is_gone(two_ranks: Path, tmp_path: Path) -> None:
    folder = copied(two_ranks / "stage2-fp16", tmp_path)

    def found(kind: str, world_size: int) -> list[str]:
        findings = ng.preflight(checkpoint=folder, world_size=world_size).findings
        return [finding.message for finding in findings if finding.kind == kind]

    assert ng.preflight(checkpoint=folder, world_size=2).ok
    (wrong,) = found("world_size", 1)
    assert "written by 2 processes" in wrong
    next(folder.rglob("*rank_1_*optim_states.pt")).unlink()
    assert found("missing_shard", 2)
    assert "holds 364 of the 384 elements of exp_avg of hidden.weight" in "".join(found("incomplete_state", 2))
    (contradiction,) = found("world_size", 2)
    assert "contradicts itself" in contradiction
