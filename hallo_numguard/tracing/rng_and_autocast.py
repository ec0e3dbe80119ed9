"""State of a call beside its arguments and weights: random numbers, and automatic casts."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

_ACCELERATORS = ("cuda", "xpu")


@dataclass(frozen=True, eq=False)
class RandomState:
    """State of torch's global generators: on the CPU, and on every accelerator of this process that is in use.

    Attributes:
        cpu: State on the CPU.
        accelerators: States by the kind of device, one per device.
    """

    cpu: torch.Tensor
    accelerators: Mapping[str, list[torch.Tensor]]

    @classmethod
    def now(cls) -> RandomState:
        """Returns the present state. No host sync."""
        states = {kind: getattr(torch, kind).get_rng_state_all() for kind in _ACCELERATORS if _is_in_use(kind)}
        if "torch.mps" in sys.modules and torch.backends.mps.is_available():
            states["mps"] = [torch.mps.get_rng_state()]
        return cls(torch.get_rng_state(), states)

    def by_device(self) -> dict[str, torch.Tensor]:
        """Returns the states of the CPU and of the current GPU, as files hold them."""
        if "cuda" not in self.accelerators:
            return {"cpu": self.cpu}
        return {"cpu": self.cpu, "cuda": self.accelerators["cuda"][torch.cuda.current_device()]}

    def restore(self) -> None:
        """Sets the generators to this state."""
        torch.set_rng_state(self.cpu)
        for kind, states in self.accelerators.items():
            module = getattr(torch, kind)
            if kind == "mps":
                module.set_rng_state(states[0])
            else:
                module.set_rng_state_all(states)


def _is_in_use(kind: str) -> bool:
    module = getattr(torch, kind, None)
    return module is not None and module.is_initialized()


@dataclass(frozen=True)
class Autocast:
    """The dtype of torch.autocast by device type, for those on which it is enabled."""

    dtypes: Mapping[str, torch.dtype]

    @classmethod
    def now(cls) -> Autocast:
        """Returns the present settings."""
        enabled = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        return cls({kind: torch.get_autocast_dtype(kind) for kind in enabled})

    def name_on(self, kind: str) -> str:
        """Returns the dtype's name as files hold it; "" if autocast is off on such a device."""
        return str(self.dtypes[kind]) if kind in self.dtypes else ""

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Enables the same dtypes, and no others."""
        with contextlib.ExitStack() as stack:
            for kind in ("cpu", "cuda"):
                if kind in self.dtypes or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, self.dtypes.get(kind), enabled=kind in self.dtypes))
            yield
