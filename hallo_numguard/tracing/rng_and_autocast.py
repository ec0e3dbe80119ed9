"""State of a call beside its arguments and weights: random numbers, and automatic casts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class RandomState:
    """State of torch's generators, on the CPU and on the current GPU."""

    cpu: torch.Tensor
    cuda: torch.Tensor | None

    @classmethod
    def now(cls) -> RandomState:
        """Returns the present state. No host sync."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None)

    def by_device(self) -> dict[str, torch.Tensor]:
        """Returns the state by device, as files hold it."""
        return {"cpu": self.cpu} if self.cuda is None else {"cpu": self.cpu, "cuda": self.cuda}

    def restore(self) -> None:
        """Sets the generators to this state."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


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
