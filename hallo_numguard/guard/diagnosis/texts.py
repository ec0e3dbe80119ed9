"""Texts that a rank sends to the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from hallo_numguard.core.documents import encode
from hallo_numguard.core.sources import Source
from hallo_numguard.guard.collectives import clip

MAX_NAME_BYTES = 300
MAX_LINE_BYTES = 400


def source_as_text(source: Source | None, rank: int, in_global_names: Callable[[str], str]) -> str | None:
    """Returns a source of this rank as JSON that is short enough for the other ranks; None without one.

    Args:
        source: The source.
        rank: This rank.
        in_global_names: See `GuardedModel`.
    """
    if source is None:
        return None
    line = None if source.line is None else clip(source.line, MAX_LINE_BYTES)
    short = replace(
        source,
        name=clip(source.name, MAX_NAME_BYTES),
        line=line,
        explanation=clip(source.explanation, MAX_LINE_BYTES),
        fill=clip(source.fill, MAX_LINE_BYTES),
        large=clip(source.large, MAX_LINE_BYTES),
        hidden_by=tuple(clip(text, MAX_LINE_BYTES) for text in source.hidden_by),
        rank=rank,
    )
    return in_global_names(json.dumps(encode(short), ensure_ascii=False))
