"""The lives, and what a guard may say in each of them. Knows no torch."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

DTYPES = {
    "fp32": "float32",
    "bf16": "autocast to bfloat16; under ZeRO, parameters in bfloat16",
    "fp16": "autocast to float16 with a scaler that begins at 2^24; under ZeRO, parameters in float16",
}

FAMILIES = (
    "vision",
    "ViT",
    "detection",
    "speech",
    "Wav2Vec2",
    "language",
    "T5",
    "LoRA",
    "QLoRA",
    "mixture of experts",
    "state space",
    "recurrent",
    "diffusion UNet",
    "DiT",
    "GAN",
    "vector quantisation",
    "normalising flow",
    "actor-critic",
    "graph",
    "recommender",
    "recommender, SGD",
    "physics-informed",
    "quantisation-aware",
    "contrastive",
    "contrastive, outside",
)

WORLDS = {
    "plain": 1,
    "DDP": 2,
    "FSDP2": 2,
    "Accelerate": 1,
    "Trainer": 1,
    "Lightning": 1,
    "ZeRO-1": 2,
    "ZeRO-2": 2,
    "ZeRO-3": 2,
}
"""Number of processes of each way to train."""

STEPS = 300
STEPS_IN_TESTS = 25

# family, way, dtype, why: not without a guard either, unless it is said
UNFIT = (
    ("GAN", "[TLZ]*", "*", "these train by one optimizer (Lightning's manual optimization is not guarded)"),
    ("recommender", "[TLZ]*", "*", "these train by one optimizer: see the one with SGD"),
    ("recommender, SGD", "[DAFpZ]*", "*", "those have one with two optimizers; DeepSpeed shards no sparse gradients"),
    ("recommender, SGD", "Trainer", "*", "it takes the norm of all gradients, which torch does not of sparse ones"),
    ("physics-informed", "ZeRO-3", "*", "a second derivative needs weights that ZeRO-3 has given away again"),
    ("quantisation-aware", "ZeRO-*", "*16", "fake quantization takes no weights in half precision"),
    ("Wav2Vec2", "ZeRO-*", "*", "DeepSpeed dies where ranks leave out different layers"),
    ("recommender*", "FSDP2", "*", "torch shards no sparse gradients"),
    ("contrastive, outside", "[DFZ]*", "*", "nothing reduces the gradient of a parameter outside of the model"),
)

# dtype, pattern, why it is true
ALLOWED = (
    ("fp16", r"report scale_too_high", "the scale begins too high, and grows until it is too high again"),
    ("*", r"note not_checked: .* because they hold integers", "frozen bytes hold no NaN; information, not a warning"),
)


@dataclass(frozen=True)
class Life:
    """One run and its unguarded twin.

    Attributes:
        family, dtype, way: Keys of `FAMILIES`, `DTYPES` and `WORLDS`.
        steps: Number of steps.
    """

    family: str
    dtype: str
    way: str
    steps: int = STEPS

    def __str__(self) -> str:
        return f"{self.family}-{self.dtype}-{self.way}"

    @property
    def world(self) -> int:
        """Number of processes."""
        return WORLDS[self.way]

    def to_dict(self) -> dict[str, Any]:
        """For the worker."""
        return asdict(self)


@dataclass(frozen=True)
class Seen:
    """What a rank has seen.

    Attributes:
        twin_error, error: What ended the twin, and the guarded run, before its end; "" if nothing did.
        different: Names of what the two ended with that is not the same bits.
        said: Every line that the guard has said, with the number of times.
        steps: Number of steps that the guard has recorded.
        skipped: Number of steps that were not applied.
        seconds: Time of the twin and of the guarded run.
    """

    twin_error: str
    error: str
    different: Sequence[str]
    said: Mapping[str, int]
    steps: int
    skipped: int
    seconds: Sequence[float]


def why_unfit(family: str, way: str, dtype: str) -> str:
    """Returns why there is no such life; "" if there is one."""
    for one, other, third, why in UNFIT:
        if all(map(fnmatch.fnmatchcase, (family, way, dtype), (one, other, third))):
            return why
    return ""


def all_lives(steps: int = STEPS) -> list[Life]:
    """Every life that can be."""
    product = itertools.product(FAMILIES, DTYPES, WORLDS)
    return [Life(family, dtype, way, steps) for family, dtype, way in product if not why_unfit(family, way, dtype)]


def covering(lives: Sequence[Life]) -> list[Life]:
    """Returns lives with every pair of family, precision and way that occurs, chosen greedily."""
    missing = {pair for life in lives for pair in _pairs(life)}
    chosen: list[Life] = []
    while missing:
        own = Counter((life.family, life.dtype) for life in chosen)
        every = Counter(life.dtype for life in chosen)
        news = {life: len(missing.intersection(_pairs(life))) for life in lives}
        # Of those with the most new pairs the one whose precision the family, and then all, have had least.
        best = max(lives, key=lambda life: (news[life], -own[life.family, life.dtype], -every[life.dtype]))
        chosen.append(best)
        missing -= _pairs(best)
    return sorted(chosen, key=lives.index)


def each_family_once(lives: Sequence[Life]) -> list[Life]:
    """Returns a life of each family, with ways and precisions in turn."""
    chosen: list[Life] = []
    for family in FAMILIES:
        own = [life for life in lives if life.family == family]
        used = [(life.way, life.dtype) for life in chosen]
        ways, dtypes = [way for way, _ in used], [dtype for _, dtype in used]
        chosen.append(min(own, key=lambda life: (ways.count(life.way), dtypes.count(life.dtype))))
    return chosen


def _pairs(life: Life) -> set[tuple[tuple[str, str], ...]]:
    axes = (("family", life.family), ("dtype", life.dtype), ("way", life.way))
    return set(itertools.combinations(axes, 2))


def is_allowed(life: Life, line: str) -> bool:
    """Whether a practitioner would call the line true."""
    return any(dtype in ("*", life.dtype) and re.match(pattern, line) for dtype, pattern, _ in ALLOWED)


def problems(life: Life, seen: Sequence[Seen]) -> list[str]:
    """Returns what is wrong with what the ranks have seen, in words; nothing if all is as it must be."""
    return [f"rank {rank}: {problem}" for rank, one in enumerate(seen) for problem in _problems(life, one)]


def _problems(life: Life, seen: Seen) -> Iterable[str]:
    if seen.twin_error:
        yield f"does not train without a guard either: {seen.twin_error}"
        return
    if seen.error:
        yield f"ended early: {seen.error}"
    elif seen.different:
        yield f"not the bits of the twin: {', '.join(seen.different[:8])}"
    elif seen.steps != life.steps:
        yield f"{seen.steps} of {life.steps} steps were guarded"
    elif life.dtype == "fp16" and not seen.skipped:
        yield "the scale did not begin too high"
    yield from (f"said {count} times: {line}" for line, count in seen.said.items() if not is_allowed(life, line))
