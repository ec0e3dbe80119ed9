"""Harmless text."""

from __future__ import annotations

import pytest

from hallo_numguard.core import safe_text as names


@pytest.mark.parametrize("width", [1, 2, 10, 100])
def test_a_shortened_text_keeps_its_ends(width):
    text = "".join(map(chr, range(65, 91))) * 4
    short = names.shortened(text, width)
    assert len(short) == min(width, len(text))
    if 10 <= width < len(text):
        assert short.startswith("ABC")
        assert short.endswith("XYZ")
    assert names.shortened("abc", 3) == "abc"
