"""Imported first by every rank: tells at its end what the guard contained, which its log may have been told to hide."""

from __future__ import annotations

import atexit
import sys
from typing import Any

PREFIX = "the guard failed in its "


def tell() -> None:
    """Prints a line for every failure of the guard in this process."""
    containment: Any = sys.modules.get("hallo_numguard.guard.containment")
    for probe, error in getattr(containment, "contained", ()):
        sys.stdout.write(f"{PREFIX}{probe}: {error!r}\n")


atexit.register(tell)
