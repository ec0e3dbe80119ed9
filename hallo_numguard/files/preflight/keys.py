"""Names and shapes of a model against those in its file. `strict=False` hides every difference."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from hallo_numguard.core.findings import Finding
from hallo_numguard.core.records import shape_in_words
from hallo_numguard.files.preflight.loaded import LoadedModel, Shapes

_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_MAX_FINDINGS = 20  # per kind; one more has the number of the others
_MIN_SIMILARITY = 0.6  # of a suggested name, as difflib measures it
_MAX_NAME_PAIRS = 40_000  # to be compared; takes seconds
_MIN_RENAMED = 3  # names in which the same component is another


def check(model: LoadedModel, saved: Shapes, path: Path) -> list[Finding]:
    """Compares the names and shapes of a model with those in its files.

    Args:
        model: The model, or the part of it that the files are for.
        saved: Shapes of the tensors in the files, by name.
        path: File or folder that messages name.

    Returns:
        Missing and unexpected names, other shapes, and prefixes or components that differ.
    """
    # Older files may hold buffers that are no longer saved.
    saved = {name: shape for name, shape in saved.items() if name not in model.unsaved}
    if not saved:
        return [_finding("no_weights", f"{path.name} holds no weights", path, remedy="Give the file with weights.")]
    saved, prefix = _match_prefix(model.shapes, saved, path)
    saved, renamed = _match_components(model.shapes, saved, path)
    return [*prefix, *renamed, *_differences(model.shapes, model.aliases, saved, path)]


def _match_prefix(model: Shapes, saved: Shapes, path: Path) -> tuple[Shapes, list[Finding]]:
    """The file's shapes under the model's names, where only the beginnings differ, with a finding about that."""
    file_prefix, model_prefix = prefixes(model, saved)
    renamed = {
        model_prefix + name.removeprefix(file_prefix) if name.startswith(file_prefix) else name: shape
        for name, shape in saved.items()
    }
    matching = len(model.keys() & saved.keys())
    if len(model.keys() & renamed.keys()) <= matching:
        return saved, []
    found = f"begin with {file_prefix!r}" if file_prefix else "begin otherwise"
    expected = f"with {model_prefix!r}" if model_prefix else "without it"
    message = (
        f"{path.name}: names {found}, and those of the model {expected}: "
        f"{matching} of {len(saved)} would be loaded, silently with strict=False"
    )
    remedy = f"Rename them first: {model_prefix!r} + name.removeprefix({file_prefix!r})."
    return renamed, [_finding("prefix", message, path, remedy=remedy)]


def prefixes(model: Shapes, saved: Shapes) -> tuple[str, str]:
    """Returns the prefixes in the file and the model before equal rests of most names; empty if there are none."""
    by_rest: dict[str, list[str]] = {}
    for name in model:
        for rest in _rests(name):
            by_rest.setdefault(rest, []).append(name)
    pairs: Counter[tuple[str, str]] = Counter()
    for name in saved:
        rest = next((rest for rest in _rests(name) if len(by_rest.get(rest, ())) == 1), "")
        if rest:
            pairs[name.removesuffix(rest), by_rest[rest][0].removesuffix(rest)] += 1
    (pair, count) = pairs.most_common(1)[0] if pairs else (("", ""), 0)
    return pair if 2 * count > len(saved.keys() - model.keys()) else ("", "")


def _rests(name: str) -> Iterator[str]:
    """The name, and what remains when its first components are removed one by one."""
    while name:
        yield name
        name = name.partition(".")[2]


def _match_components(model: Shapes, saved: Shapes, path: Path) -> tuple[Shapes, list[Finding]]:
    """The file's shapes with the model's words for components that it names otherwise, with findings about them."""
    findings: list[Finding] = []
    while True:
        pairs = _renamed_components(model, saved)
        (ours, theirs), names = max(pairs.items(), key=lambda item: len(item[1]), default=(("", ""), {}))
        if len(names) < _MIN_RENAMED:
            return saved, findings
        saved = {names.get(name, name): shape for name, shape in saved.items()}
        example, meant = next(iter(names.items()))
        message = f"{path.name} calls {ours!r} {theirs!r} in {len(names)} names, such as {example}: none is loaded"
        findings.append(_finding("renamed", message, path, name=meant, remedy=f"Rename {theirs!r} to {ours!r} first."))


def _renamed_components(model: Shapes, saved: Shapes) -> dict[tuple[str, str], dict[str, str]]:
    """Names in the file and the model with one shape and one different component, by that of the model and the file."""
    missing = {gap: (word, name) for name in model if name not in saved for gap, word in _gaps(name)}
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    for name in (name for name in saved if name not in model):
        for gap, theirs in _gaps(name):
            ours, meant = missing.get(gap, ("", ""))
            if meant and model[meant] == saved[name]:
                pairs.setdefault((ours, theirs), {})[name] = meant
    return pairs


def _gaps(name: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """The components of a name without one of them, and that one; numbers stay, or layers would be confused."""
    parts = tuple(name.split("."))
    for place, part in enumerate(parts):
        if not part.isdigit():
            yield (*parts[:place], "", *parts[place + 1 :]), part


def _differences(model: Shapes, aliases: Mapping[str, str], saved: Shapes, path: Path) -> Iterator[Finding]:
    loaded = {aliases.get(name, name) for name in saved}
    missing = [name for name in model if name not in saved and aliases.get(name, name) not in loaded]
    unexpected = [name for name in saved if name not in model]
    misshapen = [name for name in saved if name in model and saved[name] != model[name]]
    nearest = _nearest(missing, unexpected, model, saved)
    yield from _limited(
        "missing_key",
        [(name, f"lacks {name}, which the model has{_suggestion(nearest.get(name))}") for name in missing],
        path,
        "It keeps its initial values: load a file that has it, or rename it.",
    )
    yield from _limited(
        "unexpected_key",
        [(name, f"holds {name}, which the model does not have") for name in unexpected if name not in nearest.values()],
        path,
        "It is not loaded anywhere: check that the file belongs to this model.",
    )
    yield from _limited(
        "shape",
        [
            (name, f"holds {name} as {shape_in_words(saved[name])}, and the model has {shape_in_words(model[name])}")
            for name in misshapen
        ],
        path,
        "Compare the model's configuration (width, vocabulary, channels) with that of the file.",
    )


def _nearest(missing: list[str], unexpected: list[str], model: Shapes, saved: Shapes) -> dict[str, str]:
    """For names that the file lacks, the most similar other name with the same shape in it; each at most once."""
    if len(missing) * len(unexpected) > _MAX_NAME_PAIRS:
        return {}
    candidates = dict.fromkeys(unexpected)
    nearest = {}
    for name in missing:
        same_shape = {_unwrapped(other): other for other in candidates if saved[other] == model[name]}
        similar = difflib.get_close_matches(_unwrapped(name), same_shape, 1, _MIN_SIMILARITY)
        if similar:
            nearest[name] = same_shape[similar[0]]
            del candidates[nearest[name]]
    return nearest


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _suggestion(other: str | None) -> str:
    return f" (perhaps it is called {other} there)" if other else ""


def _limited(kind: str, items: list[tuple[str, str]], path: Path, remedy: str) -> Iterator[Finding]:
    """A finding per name and message, up to a number."""
    severity = "warning" if kind == "unexpected_key" else "error"
    for name, message in items[:_MAX_FINDINGS]:
        yield _finding(kind, f"{path.name} {message}", path, severity, name, remedy)
    if len(items) > _MAX_FINDINGS:
        yield _finding(kind, f"{path.name}: {len(items) - _MAX_FINDINGS} more such names", path, severity)


def _finding(kind: str, message: str, path: Path, severity: str = "error", name: str = "", remedy: str = "") -> Finding:
    return Finding(kind, message, name=name, severity=severity, file=str(path), remedy=remedy)
