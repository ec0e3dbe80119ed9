"""Where the tests and what they share lie, also for processes that a test starts."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
IMPORTABLE = os.pathsep.join(map(str, (TESTS / "support", TESTS)))
"""PYTHONPATH of a process that imports the helpers of the tests."""
