"""The environment that a report was made in."""

from __future__ import annotations

import json
import subprocess
import sys

from hallo_numguard.core import environment


def test_the_environment_is_collected_without_importing_anything():
    code = (
        "import sys, json\n"
        "from hallo_numguard.core.environment import collect\n"
        "facts = collect(3)\n"
        "assert not {'torch', 'deepspeed', 'transformers', 'accelerate', 'wandb'} & set(sys.modules)\n"
        "print(json.dumps(facts))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout)
    assert facts["rank"] == 3
    assert facts["torch"]
    assert facts["deepspeed"]
    assert facts["hides_nan"] == []


def test_loaded_modules_that_hide_nan_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.trainer", object())
    monkeypatch.setitem(sys.modules, "wandb", object())
    first, second = environment.collect()["hides_nan"]
    assert "logging_nan_inf_filter" in first
    assert "wandb.watch" in second
