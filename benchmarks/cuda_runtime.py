"""All that the benchmark asks of a GPU itself, through torch.cuda. It is touched at the first question, not before."""

from __future__ import annotations

import functools
import subprocess
from typing import Any

import torch

_MAX_CACHE_BYTES = 128 << 20  # where torch does not know the size of the L2 cache; no GPU's is much larger
_SMI_FIELDS = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.max.mem", "power.limit")


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
        """Returns an event that happens when all that was launched so far is done."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Returns the nanoseconds between two events that have happened."""
        return begin.elapsed_time(end) * 1e6

    def synchronize(self) -> None:
        """Waits until all that was launched is done."""
        torch.cuda.synchronize()

    def flush(self) -> None:
        """Launches a read of twice the L2 cache. What is written would be written back while a candidate is timed."""
        torch.sum(self._filler)

    def free_memory(self) -> int:
        """Returns the bytes that can be allocated."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def describe(self) -> dict[str, str]:
        """Returns what is known of the GPU, by name."""
        properties = self._properties
        return {
            "gpu": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": str(properties.multi_processor_count),
            "memory": f"{properties.total_memory / (1 << 30):.1f} GiB",
            "L2": f"{self._cache_bytes / (1 << 20):g} MiB" if self._cache_bytes else "unknown",
            "cuda": torch.version.cuda or torch.version.hip or "unknown",
            **self._driver_facts(),
        }

    @functools.cached_property
    def _properties(self) -> Any:
        return torch.cuda.get_device_properties(self.device)

    @property
    def _cache_bytes(self) -> int:
        """Size of the L2 cache; 0 if it is not known."""
        return getattr(self._properties, "L2_cache_size", 0)

    @functools.cached_property
    def _filler(self) -> torch.Tensor:
        count = 2 * (self._cache_bytes or _MAX_CACHE_BYTES) // 4
        return torch.zeros(count, dtype=torch.int32, device=self.device)

    def _driver_facts(self) -> dict[str, str]:
        """What only nvidia-smi tells; nothing where there is none."""
        command = ["nvidia-smi", f"--id=GPU-{getattr(self._properties, 'uuid', '')}", "--format=csv,noheader"]
        try:
            done = subprocess.run(
                [*command, f"--query-gpu={','.join(_SMI_FIELDS)}"],
                capture_output=True,
                text=True,
                timeout=30,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return {}
        return dict(zip(_SMI_FIELDS, (value.strip() for value in done.stdout.split(",")), strict=False))
