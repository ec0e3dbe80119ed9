"""What an engine may save: nothing that went bad, agreed by all ranks where all of them write."""

from __future__ import annotations

import pytest
import torch
from engine_ranks import run_engines

import hallo_numguard as ng

import deepspeed_support as support
from adapter_support import Faulty, WithLoss
from deepspeed_support import KINDS, name_of
from frameworks import hugging_face_trainer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def tags(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_every_kind_of_optimizer_saves_what_is_finite_and_nothing_else(kind, attach, tmp_path):
    setup, stage, offload, _ = kind
    engine = support.make_engine(setup, stage=stage, offload=offload)
    guard = attach(engine)
    support.train_step(engine, 0)
    engine.save_checkpoint(str(tmp_path), "finite")
    support.plant(engine, "norm.weight", (3,))
    with pytest.raises(ng.NumericsError, match=r"^DeepSpeedEngine\.save_checkpoint was about to write") as caught:
        engine.save_checkpoint(str(tmp_path), "bad")
    assert (caught.value.report.first.name, caught.value.report.first.index) == ("norm.weight", (3,))
    assert caught.value.report.first.kind == "parameter"
    with pytest.raises(ng.NumericsError, match=r"^DeepSpeedEngine\.save_16bit_model was about to write"):
        engine.save_16bit_model(str(tmp_path / "model"))
    assert tags(tmp_path) == ["finite"]
    assert (tmp_path / "latest").read_text() == "finite"
    guard.detach()
    engine.save_checkpoint(str(tmp_path), "bad")
    assert not {"save_checkpoint", "save_16bit_model"} & vars(engine).keys()


@pytest.mark.parametrize(("setup", "stage", "offload"), [("bf16", 2, True), ("fp16", 1, False), ("fp16", 3, False)])
def test_a_moment_that_is_not_finite_is_not_saved(setup, stage, offload, attach, tmp_path):
    engine = support.make_engine(setup, stage=stage, offload=offload)
    guard = attach(engine)
    support.train_step(engine, 0)
    engine.save_checkpoint(str(tmp_path), "finite")
    tensor, piece = list(guard._adapter.state_parts())[-1]
    tensor.view(-1)[1] = float("nan")
    with pytest.raises(ng.NumericsError) as caught:
        engine.save_checkpoint(str(tmp_path), "bad")
    first = caught.value.report.first
    assert (first.kind, first.nan) == ("optimizer_state", 1)
    assert first.name == guard._session._model.parameters[piece.parameter].name
    assert caught.value.report.verdict == "optimizer_state_nonfinite"
    assert tags(tmp_path) == ["finite"]
    engine.save_16bit_model(str(tmp_path / "model"))  # without the state


SAVES = """
for stage in (0, 2, 3):
    engine = support.make_engine("bf16", stage=stage)
    guard = ng.attach(engine)
    support.train_step(engine, 0)
    engine.save_checkpoint("OUT", f"finite-{stage}")
    if RANK == 1 or stage == 3:
        support.plant(engine, "hidden.weight", (23, 1))
    for save in ("save_checkpoint", "save_16bit_model") if stage == 3 else ("save_checkpoint",):
        try:
            getattr(engine, save)(f"OUT/bad-{stage}")
        except ng.NumericsError as error:
            first = error.report.first
            print("REFUSED", stage, save, first.name, first.index, first.rank, error.report.world_size)
    if stage == 2:
        if RANK == 0:  # whose copy is finite, and which calls it alone
            engine.save_16bit_model("OUT/alone")
    keeper = ng.CheckpointKeeper("OUT/kept")
    try:
        keeper.save(engine)
    except ng.NumericsError as error:
        print("KEEPER", stage, error.report.first.name)
    guard.detach()
"""


@pytest.mark.multiprocess
def test_ranks_refuse_together_though_one_alone_is_bad(tmp_path):
    for output in run_engines(SAVES.replace("OUT", str(tmp_path))):
        for stage in (0, 2, 3):
            assert f"REFUSED {stage} save_checkpoint hidden.weight (23, 1) 1 2" in output
            assert f"KEEPER {stage} hidden.weight" in output
        assert "REFUSED 3 save_16bit_model hidden.weight (23, 1) 1 2" in output
    assert tags(tmp_path / "kept") == []
    assert not list(tmp_path.glob("bad-*"))
    assert (tmp_path / "alone" / "pytorch_model.bin").exists()


def test_an_accelerator_deletes_no_older_state_for_one_that_is_refused(alone, tmp_path):
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, ProjectConfiguration

    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}}
    config |= {"zero_allow_untested_optimizer": True, "bf16": {"enabled": False}}
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
        project_config=ProjectConfiguration(tmp_path, automatic_checkpoint_naming=True, total_limit=1),
    )
    model = support.Model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    guard = ng.attach(accelerator)
    accelerator.save_state()
    support.plant(model, "norm.weight", (3,))
    with pytest.raises(ng.NumericsError, match=r"^Accelerator\.save_state was about to write"):
        accelerator.save_state()
    assert tags(tmp_path / "checkpoints") == ["checkpoint_0"]
    with pytest.raises(ng.NumericsError, match=r"^Accelerator\.save_model was about to write"):
        accelerator.save_model(model, tmp_path / "model")
    guard.detach()
    accelerator.save_model(model, tmp_path / "model")


@pytest.mark.parametrize("stage", [2, 3])
def test_a_trainer_keeps_its_finite_checkpoint_and_raises(stage, alone, tmp_path):
    config = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True, "gradient_clipping": 1.0}
    config |= {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    faulty = Faulty("none", kind=WithLoss)
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "optim": "adamw_torch"}
    trainer = hugging_face_trainer(faulty, tmp_path, use_cpu=False, deepspeed=config, max_steps=5, **settings)
    guard = ng.attach(trainer)

    class Damages(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                support.plant(trainer.deepspeed, "blocks.0.norm1.weight", (3,))

    trainer.add_callback(Damages())
    with pytest.raises(ng.NumericsError, match=r"^Trainer\._save_checkpoint was about to write"):
        trainer.train()
    assert trainer.state.global_step == 3
    assert tags(tmp_path) == ["checkpoint-2", "numguard"]
    with pytest.raises(ng.NumericsError, match=r"^Trainer\.save_model was about to write"):
        trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final").exists()
    guard.detach()
    trainer.save_model(str(tmp_path / "final"))


LEAVING = """
engine = support.make_engine("bf16", stage=2)
guard = ng.attach(engine)
support.train_step(engine, 0)
if RANK == 1:
    guard.detach()
engine.save_checkpoint("OUT", "one")  # rank 0 still asks, rank 1 answers
assert "save_checkpoint" in vars(engine)
guard.detach()
engine.save_checkpoint("OUT", "two")
engine.save_checkpoint("OUT", "three")
assert "save_checkpoint" not in vars(engine)
guard = ng.attach(engine)
if RANK == 0:
    guard.detach()
else:
    support.plant(engine, "hidden.weight", (23, 1))
try:
    engine.save_checkpoint("OUT", "bad")
except ng.NumericsError as error:
    print("REFUSED", error.report.first.name)
"""


@pytest.mark.multiprocess
def test_a_rank_that_is_detached_alone_lets_no_other_wait(tmp_path):
    for output in run_engines(LEAVING.replace("OUT", str(tmp_path / "out"))):
        assert "REFUSED hidden.weight" in output
    assert tags(tmp_path / "out") == ["one", "three", "two"]
