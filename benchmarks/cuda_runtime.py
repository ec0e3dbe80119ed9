"""All that the benchmark asks of a GPU itself, through torch.cuda. It is touched at the first question, not before."""

from __future__ import annotations

import functools
import subprocess
from typing import Any

import torch

_CACHE_UNKNOWN = 128 << 20  # where torch does not know the size of the L2 cache; no GPU's is much larger
_SMI_FIELDS = {
    "driver": "driver_version",
    "sm clock at the start": "clocks.sm",
    "highest sm clock": "clocks.max.sm",
    "highest memory clock": "clocks.max.mem",
    "power limit": "power.limit",
}


class CudaRuntime:
    """The GPU and the stream that torch uses when asked."""

    device = torch.device("cuda")

    def unavailable(self) -> str | None:
        """Returns why there is no GPU, and what to do, or None if there is one."""
        if torch.cuda.is_available():
            return None
        if torch.version.cuda is None and torch.version.hip is None:
            return f"torch {torch.__version__} cannot use GPUs: install a build that can, from https://pytorch.org"
        return f"torch {torch.__version__} sees no GPU: look at what nvidia-smi says, and at CUDA_VISIBLE_DEVICES"

    def record(self) -> torch.cuda.Event:
        """See `timing.Stream`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """See `timing.Stream`."""
        return begin.elapsed_time(end) * 1e6

    def synchronize(self) -> None:
        """See `timing.Stream`."""
        torch.cuda.synchronize()

    def flush(self) -> None:
        """See `timing.Stream`. Reads: what is written would be written back while a candidate is timed."""
        torch.sum(self._filler)

    def free_memory(self) -> int:
        """Returns the bytes that can be allocated."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def name(self) -> str:
        """Returns the GPU's name."""
        return self._properties.name

    def describe(self) -> dict[str, str]:
        """Returns what is known of the GPU."""
        properties = self._properties
        return {
            "gpu": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": str(properties.multi_processor_count),
            "memory": f"{properties.total_memory / (1 << 30):.1f} GiB",
            "L2": f"{_cache_size(properties) / (1 << 20):g} MiB" if _cache_size(properties) else "unknown",
            "cuda": torch.version.cuda or torch.version.hip or "unknown",
            **_of_driver(properties),
        }

    @functools.cached_property
    def _properties(self) -> Any:
        return torch.cuda.get_device_properties(self.device)

    @functools.cached_property
    def _filler(self) -> torch.Tensor:
        """Twice the L2 cache."""
        count = 2 * (_cache_size(self._properties) or _CACHE_UNKNOWN) // 4
        return torch.zeros(count, dtype=torch.int32, device=self.device)


def _cache_size(properties: Any) -> int:
    """Bytes; 0 if it is not known."""
    return getattr(properties, "L2_cache_size", 0)


def _of_driver(properties: Any) -> dict[str, str]:
    """What only nvidia-smi tells; nothing where there is none."""
    query = ["--query-gpu=" + ",".join(_SMI_FIELDS.values()), "--format=csv,noheader"]
    command = ["nvidia-smi", f"--id=GPU-{getattr(properties, 'uuid', '')}", *query]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_SMI_FIELDS, (value.strip() for value in done.stdout.split(",")), strict=False))
