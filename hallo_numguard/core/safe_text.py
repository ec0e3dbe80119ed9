"""Untrusted names from files and models as harmless text."""

from __future__ import annotations

from collections.abc import Sequence

MAX_NAMES = 3  # in a sentence
MAX_SENTENCE = 1000  # characters


def printable(text: str) -> str:
    """Returns `text` without control characters, which could rewrite a terminal or reverse the reading direction."""
    return "".join(character if character.isprintable() else "�" for character in text)


def shortened(text: str, width: int) -> str:
    """Returns `text` with its middle left out if it is longer than `width`: names differ at their ends."""
    if len(text) <= width:
        return text
    head = (width - 1) // 3
    tail = width - 1 - head
    return f"{text[:head]}…{text[len(text) - tail :]}"


def harmless(text: str, width: int = MAX_SENTENCE) -> str:
    """Returns `text` on one line, without control characters, no longer than `width`."""
    return printable(shortened(text, width))


def listed(names: Sequence[str]) -> str:
    """Returns the first three names, and how many more there are."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
