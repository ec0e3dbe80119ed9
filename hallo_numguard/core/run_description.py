"""Which run a report is of: its id, the time, and the command line without secrets."""

from __future__ import annotations

import re
import secrets
import sys
from collections.abc import Sequence
from datetime import datetime, timezone

from hallo_numguard.core.environment import Environment
from hallo_numguard.core.safe_text import harmless

_REDACTED = "***"
_MAX_COMMAND = 2000  # characters
_MAX_COMMAND_SHOWN = 200
_SECRET_WORDS = {
    "apikey",
    "auth",
    "credential",
    "credentials",
    "key",
    "passphrase",
    "passwd",
    "password",
    "pwd",
    "secret",
    "token",
}
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_SECRET_VALUE = re.compile(
    r"\b(hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[abp]-|AKIA|ya29\.|eyJ)[A-Za-z0-9_.\-]{12,}|\b[0-9a-f]{40}\b"
)
_LOGIN_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def new_run_id() -> str:
    """Returns a name for a run that sorts by time, and that no other run has: "20261126T041500Z-3f9a1c"."""
    return f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def utc_now() -> str:
    """Returns the time in ISO 8601, in UTC: "2026-11-26T04:15:00Z"."""
    return f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"


def command_line(arguments: Sequence[str] | None = None) -> str:
    """Returns the command that started this process, with "***" for what looks like a password, a key or a token.

    Args:
        arguments: Words of the command. Default: `sys.argv`.
    """
    words: list[str] = []
    hides_next = False
    for word in sys.argv if arguments is None else arguments:
        name, equals, _ = word.partition("=")
        if hides_next and not word.startswith("-"):
            words.append(_REDACTED)
            hides_next = False
            continue
        hides_next = word.startswith("-") and not equals and _names_a_secret(name)
        hidden = f"{name}={_REDACTED}" if equals and _names_a_secret(name) else word
        words.append(_LOGIN_IN_URL.sub(_REDACTED, _SECRET_VALUE.sub(_REDACTED, hidden)))
    return harmless(" ".join(words), _MAX_COMMAND)


def summary(environment: Environment) -> list[str]:
    """Returns the run of a report in a sentence or two, for a display; [] where the report does not say."""
    facts = {name: environment.get(name) for name in ("name", "time", "framework", "device", "command")}
    stage, world = environment.get("zero_stage"), environment.get("world_size")
    framework = f"{facts['framework']}, ZeRO stage {stage}" if stage is not None else facts["framework"]
    ranks = f"{world} ranks" if isinstance(world, int) and world > 1 else None
    said = [str(fact) for fact in (facts["name"], facts["time"], framework, ranks, facts["device"]) if fact]
    command = [harmless(str(facts["command"]), _MAX_COMMAND_SHOWN)] if facts["command"] else []
    return [", ".join(said), *command] if said else command


def _names_a_secret(name: str) -> bool:
    return not _SECRET_WORDS.isdisjoint(word.lower() for word in _WORDS.findall(name))
