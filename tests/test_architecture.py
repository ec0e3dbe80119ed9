"""What the folder listing promises: a name means one module, and facts that stand in several places agree."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from importlib import metadata

import pytest

import hallo_numguard as ng
from hallo_numguard.guard.diagnosis.catalog import CATALOG
from hallo_numguard.integrations.oldest_versions import OLDEST, check_version

from paths import ROOT

PACKAGE = ROOT / "hallo_numguard"


def test_a_module_name_stands_once() -> None:
    """Commands are named like what they show, and packages like the room that they are."""
    modules = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "cli" and not path.name.startswith("__")]
    twice = {name for name, count in Counter(path.stem for path in modules).items() if count > 1}
    assert twice == set()


def test_extras_ask_for_the_oldest_versions_of_the_table() -> None:
    wanted = {}
    for requirement in metadata.requires("hallo-numguard") or ():
        found = re.match(r"([A-Za-z0-9_-]+)>=([0-9.]+)", requirement)
        if found is not None and found[1] in OLDEST:
            wanted.setdefault(found[1], set()).add(found[2])
    assert wanted == {name: {oldest} for name, oldest in OLDEST.items() if name != "pytorch_lightning"}


@pytest.mark.parametrize(
    ("installed", "is_old"), [("1.1.0", True), ("1.2.0", False), ("2.0.dev1", False), ("x", False)]
)
def test_an_older_release_is_refused_with_the_remedy(
    installed: str, is_old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: installed)
    if not is_old:
        check_version("accelerate")
        return
    with pytest.raises(ng.InvalidInput, match=r"accelerate 1\.1\.0 is installed.* 1\.2 and later: pip install"):
        check_version("accelerate")


def test_the_tables_of_the_documents_are_those_of_the_code() -> None:
    check = [sys.executable, str(ROOT / "tools" / "write_tables.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_verdict_has_its_row_in_the_catalog() -> None:
    assert set(CATALOG) == set(ng.Verdict)
