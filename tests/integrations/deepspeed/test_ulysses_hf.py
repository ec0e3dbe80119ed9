"""ALST's attention in a model of transformers: each rank has a part of the sequence."""

from __future__ import annotations

import pytest

from deepspeed_support import HEAD, run_ranks

pytestmark = pytest.mark.multiprocess

SCRIPT = """
import transformers
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

transformers.utils.logging.disable_progress_bar()
WORLD, LENGTH = 2, 16
CONFIG = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=LENGTH, attn_implementation="sdpa",
)


def make_model():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(CONFIG)


first = make_model()
mpu = UlyssesSPAttentionHF.register_with_transformers(first, "sdpa", WORLD, micro_batch_size=2, seq_length=LENGTH)


def step(engine, number):
    tokens = torch.randint(64, (2, LENGTH + 1), generator=torch.Generator().manual_seed(number))
    mine = slice(RANK * LENGTH // WORLD, (RANK + 1) * LENGTH // WORLD)
    positions = torch.arange(LENGTH).expand(2, -1)
    logits = engine(input_ids=tokens[:, :-1][:, mine], position_ids=positions[:, mine], use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:][:, mine].flatten())
    engine.backward(losses)
    engine.step()
    return losses.item()


NAME = "model.layers.1.mlp.down_proj"
for setup, stage in (("bf16", 2), ("bf16", 3), ("fp16", 3)):
    models = [make_model() for _ in range(2)]
    for model in models:
        model.config._attn_implementation = first.config._attn_implementation
    options = dict(stage=stage, mpu=mpu, sequence_parallel_size=2)
    engines = [support.make_engine(setup, model=model, **options) for model in models]
    engine, guard = engines[0], ng.attach(engines[0], WARN)
    for number in range(3):
        losses = [step(one, number) for one in engines]
        assert losses[0] == losses[1], (setup, stage, losses)
    assert guard.last_report is None and guard.findings == [], (setup, stage, guard.last_report, guard.findings)

    layer = engine.module.get_submodule(NAME)
    bad = lambda module, args, output: output.index_fill(1, torch.tensor([3]), torch.nan)
    handle = layer.register_forward_hook(bad) if RANK == 1 else None
    step(engine, 3)
    report = guard.last_report
    print(setup, stage, report.verdict, report.first.kind, report.first.name, report.first.rank, flush=True)
    assert (report.step, report.first.name, report.first.rank) == (4, NAME, 1), (setup, stage, report)
    if handle is not None:
        handle.remove()

    support.plant(engine, f"{NAME}.weight", (23, 1))
    step(engine, 4)
    report = guard.last_report
    assert (report.step, report.verdict) == (5, "weights_nonfinite"), (setup, stage, report)
    assert (report.first.name, report.first.index) == (f"{NAME}.weight", (23, 1)), (setup, stage, report)
    guard.detach()
"""


def test_what_goes_wrong_in_a_part_of_the_sequence_is_named(tmp_path):
    run_ranks(HEAD + SCRIPT, tmp_path, timeout=170)
