"""Findings on weights, buffers and optimizer state that are not finite outside of a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from hallo_numguard.core.findings import Finding
from hallo_numguard.core.records import Offender
from hallo_numguard.guard.module_groups import by_module
from hallo_numguard.guard.named_tensors import NamedTensor

MAX_ALONE = 3  # tensors of one module that get a finding each

_OUTLOOK = {
    "parameter": "If the model reads it, the first loss will be NaN, and no loss scale can mend that.",
    "buffer": "If the forward pass reads it, the loss will be NaN.",
    "optimizer_state": "The next step that is applied writes it into the weights.",
}
_PLURAL = {"parameter": "parameters", "buffer": "buffers", "optimizer_state": "states of the optimizer"}


def weight_findings(
    found: Sequence[tuple[Offender, bool]], when: str, weights: Iterable[NamedTensor]
) -> Iterator[tuple[Finding, bool]]:
    """Returns a finding for each tensor, or for each module that has more than three, and whose it is to log.

    Args:
        found: Tensors that are not finite, and whether this rank is to log each.
        when: When they were seen, as in "attached".
        weights: All tensors that were read.
    """
    known = [(item.kind, item.name) for item in weights]
    for kind, is_mine in dict.fromkeys((offender.kind, is_mine) for offender, is_mine in found):
        offenders = {item.name: item for item, mine in found if (item.kind, mine) == (kind, is_mine)}
        all_names = [name for known_kind, name in known if (known_kind == "buffer") is (kind == "buffer")]
        for module, names in by_module(list(offenders), all_names).items():
            yield from ((finding, is_mine) for finding in _of_module(module, [offenders[at] for at in names], when))


def _of_module(module: str, offenders: Sequence[Offender], when: str) -> Iterator[Finding]:
    first = offenders[0]
    if len(offenders) > MAX_ALONE:
        what = f"{len(offenders)} {_PLURAL[first.kind]} of {module or 'the model'} are not finite, the first is {first}"
        yield Finding("nonfinite", f"{what}, seen when {when}. {_OUTLOOK[first.kind]}", name=module, offender=first)
        return
    for offender in offenders:
        message = f"{offender}, seen when {when}. {_OUTLOOK[offender.kind]}"
        yield Finding("nonfinite", message, name=offender.name, offender=offender)
