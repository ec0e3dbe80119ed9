"""Names and shapes: those that a model has against those that a file has. `strict=False` hides every difference."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from hallo_numguard.core.findings import Finding
from hallo_numguard.core.records import shape_in_words
from hallo_numguard.files.formats import Source

Shapes = Mapping[str, tuple[int, ...]]

_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_MOST = 20  # findings of a kind; one more says how many there are
_ALIKE = 0.6  # of two names, from which on one is suggested for the other
_MOST_COMPARED = 40_000  # pairs of names: seconds
_SEVERAL = 3  # names in which the same part is called otherwise


def shapes_in(source: Source) -> Shapes:
    """Returns the shapes of the weights in a file; of those that it has as master copies only (ZeRO-3), of these."""
    masters = {entry.name: entry.whole_shape for entry in source.entries if entry.role == "fp32"}
    return masters | {
        entry.name: entry.whole_shape for entry in source.entries if entry.role in ("parameter", "buffer")
    }


def compare(model: Shapes, aliases: Mapping[str, str], unsaved: frozenset[str], source: Source) -> list[Finding]:
    """Compares the names and shapes of a model with those of a file.

    Args:
        model: What the model's state dict has.
        aliases: The first name of each tensor that has several; a file has to hold it under one of them.
        unsaved: Names of buffers that are not in the state dict; older files may hold them.
        source: The file.

    Returns:
        What is missing, unexpected or of another shape, and prefixes that only one of the two has.
    """
    where = source.root
    held = {name: shape for name, shape in shapes_in(source).items() if name not in unsaved}
    if not held:
        return [_finding("no_weights", f"{where.name} holds no weights", where, remedy="Give the file with weights.")]
    renamed, findings = _without_prefix(model, held, where)
    return [*findings, *_differences(model, aliases, renamed, where)]


def _without_prefix(model: Shapes, held: Shapes, where: Path) -> tuple[Shapes, list[Finding]]:
    """The file's shapes under the model's names, where all that differs is how they begin; and a finding of it."""
    file_prefix, model_prefix = _prefixes(model, held)
    renamed = {_renamed(name, file_prefix, model_prefix): shape for name, shape in held.items()}
    if len(model.keys() & renamed.keys()) <= len(model.keys() & held.keys()):
        return held, []
    said = f"begin with {file_prefix!r}" if file_prefix else "begin otherwise"
    wanted = f"with {model_prefix!r}" if model_prefix else "without it"
    message = (
        f"{where.name}: names {said}, and those of the model {wanted}: "
        f"{len(model.keys() & held.keys())} of {len(held)} would be loaded, with strict=False without a word"
    )
    remedy = f"Rename them first: {model_prefix!r} + name.removeprefix({file_prefix!r})."
    return renamed, [_finding("prefix", message, where, remedy=remedy)]


def _renamed(name: str, file_prefix: str, model_prefix: str) -> str:
    """The name in the model of what a file calls so."""
    if not name.startswith(file_prefix):
        return name
    return model_prefix + name.removeprefix(file_prefix)


def _prefixes(model: Shapes, held: Shapes) -> tuple[str, str]:
    """How names in the file and in the model begin, where the rest is the same: the pair that most of them share."""
    by_end: dict[str, list[str]] = {}
    for name in model:
        for end in _ends(name):
            by_end.setdefault(end, []).append(name)
    pairs: Counter[tuple[str, str]] = Counter()
    for name in held:
        shared = next((end for end in _ends(name) if len(by_end.get(end, ())) == 1), "")
        if shared:
            pairs[name.removesuffix(shared), by_end[shared][0].removesuffix(shared)] += 1
    (pair, count) = pairs.most_common(1)[0] if pairs else (("", ""), 0)
    return pair if 2 * count > len(held.keys() - model.keys()) else ("", "")


def _ends(name: str) -> Iterator[str]:
    """The name, and what is left of it when parts are taken off its beginning, one after the other."""
    while name:
        yield name
        name = name.partition(".")[2]


def _differences(model: Shapes, aliases: Mapping[str, str], held: Shapes, where: Path) -> Iterator[Finding]:
    held, renamed = _without_renamed_parts(model, held, where)
    yield from renamed
    loaded = {aliases.get(name, name) for name in held}
    missing = [name for name in model if name not in held and aliases.get(name, name) not in loaded]
    unexpected = [name for name in held if name not in model]
    misshapen = [name for name in held if name in model and held[name] != model[name]]
    nearest = _nearest(missing, unexpected, model, held)
    yield from _listed(
        "missing_key",
        [(name, f"lacks {name}, which the model has{_perhaps(nearest.get(name))}") for name in missing],
        where,
        "It keeps the values that it was made with: load a file that has it, or rename it.",
    )
    yield from _listed(
        "unexpected_key",
        [(name, f"holds {name}, which the model does not have") for name in unexpected if name not in nearest.values()],
        where,
        "It is not loaded anywhere: check that the model is the one that the file is of.",
    )
    yield from _listed(
        "shape",
        [
            (name, f"holds {name} as {shape_in_words(held[name])}, and the model has {shape_in_words(model[name])}")
            for name in misshapen
        ],
        where,
        "Check the model's configuration (width, vocabulary, channels) against that of the file.",
    )


def _without_renamed_parts(model: Shapes, held: Shapes, where: Path) -> tuple[Shapes, list[Finding]]:
    """The file's shapes with the model's words for parts of names that it calls otherwise; and findings of these."""
    findings: list[Finding] = []
    while True:
        missing = {name for name in model if name not in held}
        pairs = _one_part_apart(missing, [name for name in held if name not in model], model, held)
        (ours, theirs), names = max(pairs.items(), key=lambda item: len(item[1]), default=(("", ""), {}))
        if len(names) < _SEVERAL:
            return held, findings
        held = {names.get(name, name): shape for name, shape in held.items()}
        example, meant = next(iter(names.items()))
        message = f"{where.name} calls {ours!r} {theirs!r} in {len(names)} names, such as {example}: none is loaded"
        findings.append(_finding("renamed", message, where, name=meant, remedy=f"Rename {theirs!r} to {ours!r} first."))


def _one_part_apart(
    missing: Iterable[str], unexpected: Iterable[str], model: Shapes, held: Shapes
) -> dict[tuple[str, str], dict[str, str]]:
    """Names in the file and in the model of one shape that differ in one word, by the model's word and the file's."""
    with_gaps = {gap: (word, name) for name in missing for gap, word in _gaps(name)}
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    for name in unexpected:
        for gap, theirs in _gaps(name):
            ours, meant = with_gaps.get(gap, ("", ""))
            if meant and model[meant] == held[name]:
                pairs.setdefault((ours, theirs), {})[name] = meant
    return pairs


def _gaps(name: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """The parts of a name with a gap in the place of one, and that one; numbers stay, or layers would be mixed up."""
    parts = tuple(name.split("."))
    for place, part in enumerate(parts):
        if not part.isdigit():
            yield (*parts[:place], "", *parts[place + 1 :]), part


def _nearest(missing: list[str], unexpected: list[str], model: Shapes, held: Shapes) -> dict[str, str]:
    """For names that the file lacks, the one of the same shape that it calls most alike; each at most once."""
    if len(missing) * len(unexpected) > _MOST_COMPARED:
        return {}
    left = dict.fromkeys(unexpected)
    found = {}
    for name in missing:
        same_shape = [other for other in left if held[other] == model[name]]
        alike = difflib.get_close_matches(_bare(name), map(_bare, same_shape), 1, _ALIKE)
        if alike:
            found[name] = next(other for other in same_shape if _bare(other) == alike[0])
            del left[found[name]]
    return found


def _bare(name: str) -> str:
    """Without what wrappers put into names."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _perhaps(other: str | None) -> str:
    return f" (perhaps it is called {other} there)" if other else ""


def _listed(kind: str, items: Iterable[tuple[str, str]], where: Path, remedy: str) -> Iterator[Finding]:
    items = list(items)
    severity = "warning" if kind == "unexpected_key" else "error"
    for name, message in items[:_MOST]:
        yield _finding(kind, f"{where.name} {message}", where, severity, name, remedy)
    if len(items) > _MOST:
        yield _finding(kind, f"{where.name}: {len(items) - _MOST} more such names", where, severity)


def _finding(
    kind: str, message: str, where: Path, severity: str = "error", name: str = "", remedy: str = ""
) -> Finding:
    return Finding(kind, message, name=name, severity=severity, file=str(where), remedy=remedy)
