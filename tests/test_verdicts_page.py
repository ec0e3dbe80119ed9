"""docs/verdicts.md: a section for every verdict, with the report that the script in tests/verdicts makes today."""

from __future__ import annotations

import os
import re
import runpy
import shutil
from pathlib import Path

import pytest

import hallo_numguard as ng
from hallo_numguard.core.records import Verdict

from deepspeed_support import run_ranks

PAGE = Path(__file__).parents[1] / "docs" / "verdicts.md"
SCRIPTS = Path(__file__).parent / "verdicts"
OF_TWO_RANKS = (Verdict.REDUCTION_OVERFLOW, Verdict.RANK_FAULT)
pytestmark = pytest.mark.usefixtures("cpu_alone")


def said(verdict, folder, monkeypatch):
    """The report that the script of a verdict gets, without the row on the run."""
    script = SCRIPTS / f"{verdict}.py"
    if verdict in OF_TWO_RANKS:
        text = "".join(run_ranks(script.read_text(encoding="utf-8"), folder))
        text = text[text.index("REPORT ") :].removeprefix("REPORT ")
    else:
        shutil.copy(script, folder / "train.py")
        monkeypatch.chdir(folder)
        text = str(runpy.run_path("train.py")["report"])
    return re.sub(r"\n  run  .*", "", text, flags=re.DOTALL)


def gist(text):
    """A text without its numbers, which may round otherwise on another machine, and without its line breaks."""
    return re.sub(r"\d[\d.,e+-]*", "0", " ".join(text.split()))


@pytest.mark.parametrize("verdict", list(ng.Verdict), ids=str)
def test_the_page_shows_what_the_guard_says(verdict, tmp_path, monkeypatch):
    text = said(verdict, tmp_path, monkeypatch)
    assert re.search(rf"^  verdict +{verdict} ", text, re.MULTILINE), text
    page = PAGE.read_text(encoding="utf-8")
    block = re.search(rf"(<!-- report: {verdict} -->\n```\n)(.*?)(\n```\n<!-- end -->)", page, re.DOTALL)
    assert block is not None, f"docs/verdicts.md has no report for {verdict}"
    if os.environ.get("UPDATE_GOLDENS"):
        PAGE.write_text(page[: block.start(2)] + text + page[block.end(2) :], encoding="utf-8")
    else:
        assert gist(block[2]) == gist(text)


def test_every_section_names_the_report_that_its_script_is_rebuilt_from():
    page = PAGE.read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert list(sections) == [str(verdict) for verdict in Verdict]
    for verdict, section in sections.items():
        source = re.search(r"(\S+/\S+) #(\d+)", (SCRIPTS / f"{verdict}.py").read_text(encoding="utf-8"))
        assert f"[{source[1]} #{source[2]}](https://github.com/{source[1]}/issues/{source[2]})" in section
        assert "**What to do**" in section
