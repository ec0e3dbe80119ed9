"""Launcher and precision: settings that disable loss scaling, or start one process instead of several."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hallo_numguard.core.findings import Finding
from hallo_numguard.files.formats import Source
from hallo_numguard.files.preflight.run_spec import RunSpec, block, is_enabled

_LAUNCHER_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
_LAUNCHER_REMEDY = "Start it with `accelerate launch`, `deepspeed` or `torchrun`, not with python."


def check(spec: RunSpec, sources: list[Source]) -> list[Finding]:
    """Checks configuration, launcher and files against each other."""
    return [*_launcher(spec), *_configuration(spec), *_unscaled_half(spec, sources)]


def _launcher(spec: RunSpec) -> Iterator[Finding]:
    if spec.environment is None:
        return
    is_launched = any(name in spec.environment for name in _LAUNCHER_VARIABLES)
    expected = spec.world_size or 1
    if not is_launched and (spec.config or expected > 1):
        what = f"{expected} processes were" if expected > 1 else "a DeepSpeed configuration was"
        yield Finding(
            "launcher",
            f"this process was started with plain python, and {what} asked for: there is one process, and no "
            "DeepSpeed under Accelerate",
            severity="error",
            remedy=_LAUNCHER_REMEDY,
        )
    started = spec.environment.get("WORLD_SIZE", "")
    if started.isdigit() and spec.world_size is not None and int(started) != spec.world_size:
        yield Finding(
            "launcher",
            f"the launcher has started {started} processes, and {spec.world_size} were asked for",
            severity="error",
            remedy="Change --nproc_per_node (torchrun), --num_gpus (deepspeed) or num_processes (accelerate).",
        )
    if spec.config and spec.environment.get("ACCELERATE_USE_CPU", "").lower() == "true":
        yield Finding(
            "launcher",
            "ACCELERATE_USE_CPU is set: Accelerate leaves DeepSpeed out without warning",
            remedy="Unset it, or set use_cpu: false in the configuration of Accelerate.",
        )


def _configuration(spec: RunSpec) -> Iterator[Finding]:
    config = spec.config
    if is_enabled(config, "fp16") and (is_enabled(config, "bf16") or is_enabled(config, "bfloat16")):
        message = "the configuration enables both fp16 and bf16"
        yield Finding("precision", message, severity="error", remedy="Disable one of them.")
    scale = block(config, "fp16").get("loss_scale", 0)
    if is_enabled(config, "fp16") and isinstance(scale, (int, float)) and scale > 0:
        yield Finding(
            "precision",
            f"fp16.loss_scale is {scale:g}, which never changes: steps that overflow are skipped one after the other",
            remedy="Set fp16.loss_scale to 0 for a dynamic loss scale.",
        )


def _unscaled_half(spec: RunSpec, sources: list[Source]) -> Iterator[Finding]:
    """float16 weights although the configuration disables loss scaling."""
    if not spec.config or is_enabled(spec.config, "fp16") or spec.precision not in (None, "float16"):
        return
    if "auto" in map(str, block(spec.config, "fp16").values()):
        return
    halves = [source.root.name for source in sources if _is_half(source)]
    if halves or spec.precision == "float16":
        which = f"{', '.join(halves)} holds weights in float16" if halves else "the model is in float16"
        yield Finding(
            "precision",
            f"{which}, and the configuration disables fp16: gradients below 6e-8 vanish, and whether the loss is "
            "scaled depends on the optimizer (ZeRO stages 1 to 3 do it for the weights' dtype, stage 0 does not)",
            remedy='Set "fp16": {"enabled": true}, or train in bfloat16.',
        )


def _is_half(source: Source) -> bool:
    dtypes = [entry.dtype for entry in source.entries if entry.role == "parameter" and entry.numel]
    return bool(dtypes) and 2 * dtypes.count(torch.float16) > len(dtypes)
