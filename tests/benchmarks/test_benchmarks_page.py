from __future__ import annotations

import re

import pytest
from benchmark_support import BENCHMARKS


@pytest.fixture
def page(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import page

    return page


def test_the_tables_are_those_of_the_figures(page):
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.render(text) == text, "run: python benchmarks/page.py"
    assert set(re.findall(r"<!-- table: (\S+) -->", text)) == set(page.TABLES)


def test_a_figure_is_put_in_the_place_of_the_one_before(page):
    stale = "before\n<!-- table: forward-passes -->\n| stale |\n<!-- end -->\nafter\n"
    made = page.render(stale)
    assert "stale" not in made
    assert "| DebugUnderflowOverflow | 263 | 17 | 57 | 6.9 |" in made
    assert made.startswith("before\n<!-- table: forward-passes -->\n")
    assert made.endswith("<!-- end -->\nafter\n")
