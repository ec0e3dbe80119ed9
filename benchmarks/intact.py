"""What a scan says of intact files: models of many architectures, new and after steps, and checkpoints of frameworks.

    python benchmarks/intact.py [--only WORD]

Every model and checkpoint is written by the library that makes such files. Libraries that are not installed are left
out (peft, diffusers). Each warning or error is a false alarm.

Exit code: 0 none, 1 some, which are printed.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from output import make_console, print_table
from torch import nn

import hallo_numguard as ng

Writer = Callable[[Path], object]

SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
TEXT = {**SIZES, "vocab_size": 500, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**TEXT, "num_key_value_heads": 2}
ENCODER_DECODER = {
    "d_model": 64,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "vocab_size": 500,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
GPT = {
    "rotary_dim": 8,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "vocab_size": 500,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
RECURRENT = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 500}
STAGES = {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 32, 64]}
AUDIO = {**TEXT, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
MIXTURE = {
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "qk_nope_head_dim": 16,
    "first_k_dense_replace": 1,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "granite", "olmo2"), GROUPED),
    **dict.fromkeys(("mixtral", "qwen2_moe", "stablelm", "starcoder2", "cohere", "glm", "nemotron"), GROUPED),
    **dict.fromkeys(("bert", "roberta", "electra", "albert", "ernie", "roformer", "mpnet", "convbert"), TEXT),
    **dict.fromkeys(("gpt_neox", "falcon", "phi", "megatron-bert", "camembert", "xlm-roberta"), TEXT),
    **dict.fromkeys(("mamba", "rwkv"), RECURRENT),
    **dict.fromkeys(("vit", "vit_mae", "deit", "beit", "data2vec-vision", "dinov2", "vit_msn", "yolos"), SIZES),
    **dict.fromkeys(("wav2vec2", "hubert", "wavlm", "unispeech", "data2vec-audio"), AUDIO),
    **dict.fromkeys(("bart", "marian", "mbart", "pegasus", "whisper", "blenderbot"), ENCODER_DECODER),
    **dict.fromkeys(("gpt2", "gptj", "codegen"), GPT),
    **dict.fromkeys(("convnext", "convnextv2"), STAGES),
    "mamba2": {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "vocab_size": 500,
        "num_heads": 8,
        "head_dim": 16,
        "n_groups": 1,
    },
    "resnet": {**STAGES, "embedding_size": 8},
    "deepseek_v3": {**TEXT, "num_key_value_heads": 4, **MIXTURE},
    "deberta-v2": {**TEXT, "relative_attention": True, "position_buckets": 32, "pos_att_type": ["p2c", "c2p"]},
    "t5": {"d_model": 64, "num_layers": 3, "num_heads": 4, "d_ff": 128, "d_kv": 16, "vocab_size": 500},
    "xlnet": {"d_model": 64, "n_layer": 3, "n_head": 4, "d_inner": 128, "vocab_size": 500},
    "distilbert": {"dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 128, "vocab_size": 500},
    "opt": {**TEXT, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "bloom": {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 500},
    "swin": {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]},
    "swinv2": {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]},
    "segformer": {"hidden_sizes": [8, 16, 32, 64], "decoder_hidden_size": 32},
    "efficientnet": {"width_coefficient": 0.1, "depth_coefficient": 0.3},
    "mobilenet_v2": {"depth_multiplier": 0.1},
    "encodec": {"num_filters": 4, "hidden_size": 16, "codebook_size": 32, "codebook_dim": 16},
}


def library(name: str) -> Any:
    """Returns a module, whose types are not looked at: it may not be installed."""
    return importlib.import_module(name)


def step(module: nn.Module, folder: Path | None = None) -> None:
    """Makes two steps of AdamW with random gradients; with a folder, writes the optimizer's state into it."""
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3)
    for _ in range(2):
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    if folder is not None:
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def architecture(name: str, options: dict[str, Any], is_stepped: bool) -> Writer:
    """Returns what writes a model of transformers."""

    def write(folder: Path) -> None:
        transformers = library("transformers")
        decoders = library("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        config = transformers.CONFIG_MAPPING[name](**options)
        is_decoder = name in decoders and name not in ("bert", "roberta", "electra")
        made = transformers.AutoModelForCausalLM if is_decoder else transformers.AutoModel
        model = made.from_config(config)
        if is_stepped:
            step(model, folder)
        model.save_pretrained(folder, **({"max_shard_size": "100KB"} if is_stepped else {}))

    return write


def net() -> nn.Sequential:
    """Returns a small network with normalisation."""
    return nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16))


def trainer(folder: Path) -> None:
    """Writes checkpoints with the Trainer of transformers."""
    transformers = library("transformers")

    class Data(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 32

        def __getitem__(self, number: int) -> Any:
            return {"input_ids": torch.arange(8) + 3, "labels": number % 3}

    config = transformers.CONFIG_MAPPING["bert"](**TEXT, num_labels=3)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    options = {"max_steps": 4, "save_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = transformers.TrainingArguments(str(folder), **options)
    run = transformers.Trainer(model, arguments, train_dataset=Data())
    run.train()
    run.save_model()


def lightning(folder: Path) -> None:
    """Writes a checkpoint with Lightning."""
    lightning = library("lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc] # it is imported when needed
        def __init__(self, width: int = 16) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = net()

        def training_step(self, batch: torch.Tensor, _: int) -> Any:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters())

    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    data: Any = torch.randn(32, 16)
    run = lightning.Trainer(**options, enable_model_summary=False, default_root_dir=str(folder))
    run.fit(Module(), torch.utils.data.DataLoader(data, 8))


def accelerate(folder: Path) -> None:
    """Writes two checkpoints with Accelerate."""
    accelerator = library("accelerate").Accelerator(cpu=True)
    model: Any = net()
    optimizer: Any = torch.optim.AdamW(model.parameters())
    scheduler: Any = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=10)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    for number in range(2):
        accelerator.backward(model(torch.randn(8, 16)).square().mean())
        optimizer.step()
        scheduler.step()
        accelerator.save_state(str(folder / f"checkpoint_{number}"))


def distributed(folder: Path) -> None:
    """Writes two checkpoints with torch.distributed.checkpoint."""
    dcp = library("torch.distributed.checkpoint")
    get_state_dict = library("torch.distributed.checkpoint.state_dict").get_state_dict
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    for number in (1, 2):
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        state, moments = get_state_dict(model, optimizer)
        dcp.save({"model": state, "optimizer": moments, "step": number}, checkpoint_id=folder / f"step-{number}")


def plain(make: Callable[..., torch.optim.Optimizer]) -> Writer:
    """Returns what writes model, optimizer and scheduler into one file of torch.save."""

    def write(folder: Path) -> None:
        model = net()
        optimizer = make(model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 16)).square().mean().backward()
            optimizer.step()
            scheduler.step()
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        torch.save({name: part.state_dict() for name, part in parts.items()} | {"epoch": 3}, folder / "last.pt")

    return write


def adapter(kind: str, is_stepped: bool) -> Writer:
    """Returns what writes an adapter of peft."""

    def write(folder: Path) -> None:
        peft, transformers = library("peft"), library("transformers")
        model = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING["llama"](**GROUPED))
        options: dict[str, Any] = {"task_type": "CAUSAL_LM"}
        if kind == "dora":
            options["use_dora"] = True
        if kind in ("lora", "dora", "loha", "lokr", "ia3", "adalora", "vera"):
            options["target_modules"] = ["q_proj", "v_proj"]
        if kind in ("prompt", "prefix"):
            options["num_virtual_tokens"] = 4
        if kind == "ia3":
            options["feedforward_modules"] = []
        if kind == "adalora":
            options["total_step"] = 10
        names = {
            "dora": "LoraConfig",
            "prompt": "PromptTuningConfig",
            "prefix": "PrefixTuningConfig",
            "ia3": "IA3Config",
        }
        names |= {"lora": "LoraConfig", "loha": "LoHaConfig", "lokr": "LoKrConfig", "adalora": "AdaLoraConfig"}
        adapted = peft.get_peft_model(model, getattr(peft, names.get(kind, "VeraConfig"))(**options))
        if is_stepped:
            step(adapted)
        adapted.save_pretrained(folder)

    return write


DIFFUSERS: dict[str, dict[str, Any]] = {
    "UNet2DModel": {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "sample_size": 16,
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "UNet2DConditionModel": {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "norm_num_groups": 8,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
    },
    "ControlNetModel": {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "conditioning_embedding_out_channels": (16, 32),
    },
    "AutoencoderKL": {
        "block_out_channels": (32, 64),
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    "DiTTransformer2DModel": {
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "num_layers": 3,
        "sample_size": 8,
        "num_embeds_ada_norm": 10,
        "patch_size": 2,
    },
    "PixArtTransformer2DModel": {
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "num_layers": 3,
        "sample_size": 8,
        "cross_attention_dim": 64,
        "caption_channels": 32,
    },
    "SD3Transformer2DModel": {
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "sample_size": 8,
        "joint_attention_dim": 32,
        "caption_projection_dim": 64,
        "pooled_projection_dim": 32,
    },
    "FluxTransformer2DModel": {
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 6, 6),
        "in_channels": 16,
    },
    "MotionAdapter": {
        "block_out_channels": (32, 64),
        "motion_layers_per_block": 1,
        "motion_num_attention_heads": 4,
        "motion_norm_num_groups": 8,
    },
    "VQModel": {"block_out_channels": (32,), "norm_num_groups": 8, "num_vq_embeddings": 16},
    "AutoencoderTiny": {"encoder_block_out_channels": (16, 16, 16, 16), "decoder_block_out_channels": (16, 16, 16, 16)},
}


def diffusion(name: str, is_stepped: bool) -> Writer:
    """Returns what writes a model of diffusers."""

    def write(folder: Path) -> None:
        model = getattr(library("diffusers"), name)(**DIFFUSERS[name])
        if is_stepped:
            step(model)
        model.save_pretrained(folder / "unet")

    return write


def cases() -> Iterator[tuple[str, str, Writer]]:
    """Yields kind, name and writer of every case."""
    for is_stepped, when in ((False, "new"), (True, "after steps, sharded")):
        for name, options in ARCHITECTURES.items():
            yield f"transformers, {when}", name, architecture(name, options, is_stepped)
    for framework in (trainer, lightning, accelerate, distributed):
        yield "checkpoints of frameworks", framework.__name__, framework
    for name in ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "RMSprop", "Adadelta", "Rprop", "ASGD"):
        yield "optimizers of torch, one file", name, plain(getattr(torch.optim, name))
    if importlib.util.find_spec("peft"):
        for kind in ("lora", "dora", "loha", "lokr", "ia3", "adalora", "vera", "prompt", "prefix"):
            for is_stepped in (False, True):
                yield "adapters of peft", f"{kind}{' after steps' if is_stepped else ''}", adapter(kind, is_stepped)
    if importlib.util.find_spec("diffusers"):
        for name in DIFFUSERS:
            for is_stepped in (False, True):
                yield "diffusers", f"{name}{' after steps' if is_stepped else ''}", diffusion(name, is_stepped)


@click.command()
@click.option("--only", default="", help="Cases with this word in their kind or name.")
def main(only: str) -> None:
    """Count false alarms on intact files."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    counts: dict[str, list[int]] = {}
    for kind, name, write in cases():
        if only not in f"{kind} {name}":
            continue
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as scratch:
            try:
                write(Path(scratch))
            except Exception as error:  # noqa: BLE001 - versions of libraries differ in what they can make
                click.echo(f"not written: {kind}, {name}: {type(error).__name__}: {str(error)[:100]}", err=True)
                continue
            report = ng.scan(scratch)
            alarms = [finding for finding in report.findings if finding.severity != "info"]
            count = counts.setdefault(kind, [0, 0, 0])
            count[0] += 1
            count[1] += bool(alarms)
            count[2] += bool(report.unchecked)
            for sentence in (*(finding.message for finding in alarms), *report.unchecked):
                click.echo(f"{kind}, {name}: {sentence}", err=True)
    rows = [[kind, *map(str, count)] for kind, count in counts.items()]
    print_table(make_console(), "Intact files", ["kind", "written and scanned", "false alarms", "not checked"], rows)
    sys.exit(any(count[1] or count[2] for count in counts.values()))


if __name__ == "__main__":
    main()
