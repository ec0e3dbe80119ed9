"""Launcher and precision: what turns loss scaling off, or leaves one process where several were meant."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats import Source
from hallo_numguard.files.preflight.run_spec import Plan, block, is_on

_LAUNCHED = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
_LAUNCHERS = "Start it with `accelerate launch`, `deepspeed` or `torchrun`, not with python."


def check(plan: Plan, sources: list[Source]) -> list[Finding]:
    """Returns where configuration, launcher and files do not go together."""
    return [*_launcher(plan), *_blocks(plan), *_half(plan, sources)]


def _launcher(plan: Plan) -> Iterator[Finding]:
    if plan.environment is None:
        return
    launched = any(name in plan.environment for name in _LAUNCHED)
    wanted = plan.world_size or 1
    if not launched and (plan.config or wanted > 1):
        why = f"{wanted} processes" if wanted > 1 else "a DeepSpeed configuration"
        yield Finding(
            "launcher",
            f"this process was started with plain python, and {why} was asked for: there is one process, and no "
            "DeepSpeed under Accelerate",
            severity="error",
            remedy=_LAUNCHERS,
        )
    told = plan.environment.get("WORLD_SIZE", "")
    if told.isdigit() and plan.world_size is not None and int(told) != plan.world_size:
        yield Finding(
            "launcher",
            f"the launcher has started {told} processes, and {plan.world_size} were asked for",
            severity="error",
            remedy="Change --nproc_per_node (torchrun), --num_gpus (deepspeed) or num_processes (accelerate).",
        )
    if plan.config and plan.environment.get("ACCELERATE_USE_CPU", "").lower() == "true":
        yield Finding(
            "launcher",
            "ACCELERATE_USE_CPU is set: Accelerate leaves DeepSpeed out without a word",
            remedy="Unset it, or set use_cpu: false in the configuration of Accelerate.",
        )


def _blocks(plan: Plan) -> Iterator[Finding]:
    config = plan.config
    if is_on(config, "fp16") and (is_on(config, "bf16") or is_on(config, "bfloat16")):
        message = "the configuration switches both fp16 and bf16 on"
        yield Finding("precision", message, severity="error", remedy="Switch one of them off.")
    scale = block(config, "fp16").get("loss_scale", 0)
    if is_on(config, "fp16") and isinstance(scale, (int, float)) and scale > 0:
        yield Finding(
            "precision",
            f"fp16.loss_scale is {scale:g}, which never changes: steps that overflow are skipped one after the other",
            remedy="Set fp16.loss_scale to 0, so that it is found by trying.",
        )


def _half(plan: Plan, sources: list[Source]) -> Iterator[Finding]:
    """Half-precision weights where nothing scales the loss because the configuration says so."""
    if not plan.config or is_on(plan.config, "fp16") or plan.precision not in (None, "float16"):
        return
    if "auto" in map(str, block(plan.config, "fp16").values()):
        return
    halves = [source.root.name for source in sources if _is_half(source)]
    if halves or plan.precision == "float16":
        which = f"{', '.join(halves)} holds weights in float16" if halves else "the model is in float16"
        yield Finding(
            "precision",
            f"{which}, and the configuration has fp16 switched off: gradients below 6e-8 vanish, and what scales the "
            "loss is an accident (ZeRO does by the dtype it meets, stage 0 and plain python do not)",
            remedy='Set "fp16": {"enabled": true}, or train in bfloat16.',
        )


def _is_half(source: Source) -> bool:
    dtypes = [entry.dtype for entry in source.entries if entry.role == "parameter" and entry.numel]
    return bool(dtypes) and 2 * dtypes.count(torch.float16) > len(dtypes)
