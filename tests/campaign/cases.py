"""The cases, and what is right in each of them. Knows no torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from campaign.options import FAULTS_TRIED, OPTIONS

FAULTS = {
    "none": "no fault: 30 clean steps",
    "weight": "NaN in a trained weight",
    "frozen_weight": "NaN in a frozen weight",
    "buffer": "NaN in a buffer, since before the run",
    "optimizer_state": "NaN in the optimizer's state",
    "input": "NaN in one sample of one rank's batch",
    "loss": "Inf in one rank's loss",
    "forward": "a forward pass that overflows (float16: a finite weight of 60000; else an Inf put in)",
    "backward": "NaN born in the backward pass (square root at 0)",
    "gradient": "NaN in one element of one rank's gradient",
    "scale": "a loss scale of 2^34",
    "reduction": "gradients that are finite on each rank, whose sum is not",
    "refused": "no fault: an engine that the guard does not work with; `model` says what it has",
}

EXPECTED = {
    "none": "nothing",
    "weight": "`weights_nonfinite`, tensor, index, rank; the run is stopped at that step",
    "frozen_weight": "likewise",
    "buffer": "likewise, and a finding at attach",
    "optimizer_state": "`optimizer_state_nonfinite`, tensor, index; the run is stopped at the first bad loss",
    "input": "`input_nonfinite`, argument, index, rank; one step is skipped",
    "loss": (
        "`undetermined`: the loss, its rank, and that every module was finite; in a pipeline, whose loss function is "
        "run again, `loss_nonfinite` with its micro-batch; one step is skipped"
    ),
    "forward": "`forward_nonfinite`, module, rank; every step is skipped while the weight is there",
    "backward": "`backward_nonfinite`, module, rank",
    "gradient": (
        "`rank_fault`, tensor, index, rank (local gradients are looked at); in one process or copy of a pipeline, and "
        "with `torch_autocast` at stage 3, `undetermined`"
    ),
    "scale": "`scale_too_high`, and the scale at which it settles",
    "reduction": "`reduction_overflow`, tensor, index",
    "refused": "`UnsupportedDeepSpeed`, where DeepSpeed itself runs here",
}


class Kind(NamedTuple):
    """A kind of engine.

    Attributes:
        setup: As `deepspeed_support.make_engine` takes it; or autocast_fp16, autocast_bf16: DeepSpeed's torch_autocast.
        stage: Of ZeRO.
        offload: Whether the optimizer's state lies on the CPU.
        way: What else is shared out or changed, a key of `WAYS`.
    """

    setup: str
    stage: int
    offload: bool = False
    way: str = "dense"

    def __str__(self) -> str:
        way = "" if self.way == "dense" else f"-{self.way}"
        return f"{self.setup}-stage{self.stage}{'-offload' if self.offload else ''}{way}"

    @property
    def words(self) -> str:
        """The kind as a reader of the documentation knows it."""
        way = WAYS[self.way].words
        return (
            f"stage {self.stage}, {SETUPS[self.setup]}{', offload' if self.offload else ''}{f', {way}' if way else ''}"
        )


SETUPS = {
    "fp32": "float32",
    "fp16": "fp16",
    "half": "float16 parameters with fp16 off",
    "bf16": "bf16",
    "bf16_fp32": "bf16 with float32 gradients",
    "autocast_fp16": "`torch_autocast` fp16",
    "autocast_bf16": "`torch_autocast` bf16",
}


class Way(NamedTuple):
    """What is shared out or changed besides ZeRO.

    Attributes:
        words: What it is, for the table.
        worlds: Numbers of processes.
        models: Models that can be trained so.
    """

    words: str
    worlds: tuple[int, ...]
    models: tuple[str, ...]


WAYS = {
    "dense": Way("", (1, 2, 4), ("transformer", "unet", "experts")),
    "autotp": Way("AutoTP, 2 parts", (2, 4), ("transformer",)),
    "hpz": Way("ZeRO++ hpZ, 2 ranks a partition", (2, 4), ("transformer", "unet")),
    "ulysses": Way("Ulysses, a sequence over 2 ranks", (2, 4), ("transformer",)),
    "compiled": Way('`engine.compile()`, backend "eager"', (1,), ("transformer",)),
    "pipeline": Way("pipeline of 2 stages, accumulation 4", (2, 4), ("transformer",)),
    **{key: Way(option.words, (2,), (option.model,)) for key, option in OPTIONS.items()},
}

# What attach refuses, and a single process can have.
REFUSED = (
    "an engine without optimizer",
    "SuperOffload",
    "1-bit optimizers",
    "MiCS",
)

# One of each optimizer class and way of keeping gradients.
DENSE = (
    Kind("fp32", 0),
    Kind("fp16", 0),
    Kind("bf16", 0),
    Kind("bf16_fp32", 1),
    Kind("fp16", 1),
    Kind("fp16", 2),
    Kind("half", 2),
    Kind("bf16", 2),
    Kind("bf16_fp32", 2),
    Kind("fp32", 2),
    Kind("fp16", 1, True),
    Kind("fp16", 2, True),
    Kind("bf16", 2, True),
    Kind("fp16", 3),
    Kind("bf16", 3),
    Kind("fp32", 3),
    Kind("fp16", 3, True),
    Kind("bf16", 3, True),
)
KINDS = (
    *DENSE,
    *(Kind(setup, stage) for setup in ("autocast_fp16", "autocast_bf16") for stage in range(4)),
    Kind("fp32", 0, way="autotp"),
    Kind("bf16", 0, way="autotp"),
    Kind("bf16_fp32", 1, way="autotp"),
    Kind("fp16", 1, way="autotp"),
    Kind("bf16", 2, way="autotp"),
    Kind("bf16", 3, way="autotp"),
    Kind("fp16", 3, way="hpz"),
    Kind("bf16", 3, way="hpz"),
    Kind("bf16", 0, way="ulysses"),  # with BF16_Optimizer DeepSpeed 0.19.8 itself fails in its norm
    Kind("fp16", 2, way="ulysses"),
    Kind("bf16", 3, way="ulysses"),
    Kind("bf16", 0, way="compiled"),
    Kind("fp16", 2, way="compiled"),
    Kind("bf16", 3, way="compiled"),
    Kind("fp32", 0, way="pipeline"),
    Kind("fp16", 0, way="pipeline"),
    Kind("fp16", 1, way="pipeline"),
    Kind("bf16", 1, way="pipeline"),
    Kind("bf16_fp32", 1, way="pipeline"),
    *(Kind(*engine, option.offload, key) for key, option in OPTIONS.items() for engine in option.engines),
)
MODELS = ("transformer", "unet", "experts", "sparse")
CLEAN_STEPS, CLEAN_STEPS_IN_TESTS, FAULTY_STEP, STEPS = 30, 8, 3, 6
STAGES, MICRO_BATCHES = 2, 4  # of a pipeline


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        fault: A key of `FAULTS`.
        model: transformer, unet, experts, or sparse: with a mixture of experts in plain PyTorch.
        setup, stage, offload, way: See `Kind`.
        world: Number of processes.
        clean_steps: Steps of a run without a fault.
    """

    fault: str
    model: str
    setup: str
    stage: int
    offload: bool
    world: int
    way: str = "dense"
    clean_steps: int = CLEAN_STEPS

    def __str__(self) -> str:
        return f"{self.fault}-{self.model}-{self.kind}-{self.world}"

    @property
    def kind(self) -> Kind:
        """The engine."""
        return Kind(self.setup, self.stage, self.offload, self.way)

    @property
    def is_autocast(self) -> bool:
        """Whether DeepSpeed's torch_autocast is on."""
        return self.setup.startswith("autocast")

    @property
    def is_half(self) -> bool:
        """Whether the loss scale is dynamic: DeepSpeed does so for float16 only."""
        return self.setup in ("fp16", "half", "autocast_fp16")

    @property
    def has_large_weight(self) -> bool:
        """Whether a weight makes the forward pass overflow, and stays: not that of an expert without tokens."""
        return self.fault == "forward" and self.is_half and self.model != "experts"

    @property
    def culprit(self) -> int:
        """The rank on which the fault is planted, where it is one rank's: in a pipeline one of the last copy.

        Its first stage has the batch and what is frozen, its last one the loss and the weight that is damaged.
        """
        if self.way == "pipeline" and self.fault in ("frozen_weight", "input"):
            return self.world // STAGES - 1
        return self.world - 1

    @property
    def copies(self) -> int:
        """Number of ranks that compute the same of other batches."""
        return self.world // STAGES if self.way == "pipeline" else self.world

    @property
    def faulty_call(self) -> int:
        """Number of the model's call with the fault, the last one of a step."""
        if self.way == "pipeline":
            return FAULTY_STEP * MICRO_BATCHES
        return FAULTY_STEP * (OPTIONS[self.way].micro_batches if self.way in OPTIONS else 1)

    def to_dict(self) -> dict[str, Any]:
        """For the worker."""
        return asdict(self)


def all_cases() -> list[Case]:
    """Every case that can be."""
    planted = [
        Case(fault, model, kind.setup, kind.stage, kind.offload, world, kind.way)
        for fault, model, kind in itertools.product(FAULTS, MODELS, KINDS)
        for world in WAYS[kind.way].worlds
        if _exists(fault, model, kind, world)
    ]
    return planted + [Case("refused", feature, "bf16", 0, False, 1, "refused") for feature in REFUSED]


def _exists(fault: str, model: str, kind: Kind, world: int) -> bool:
    setup, stage, _, way = kind
    is_autocast = setup.startswith("autocast")
    if fault == "refused" or model not in WAYS[way].models or (way in OPTIONS and fault not in FAULTS_TRIED):
        return False
    if world == 4 and way != "pipeline" and not _is_on_four(fault, model, kind):
        return False
    if is_autocast and model != "transformer":
        return False
    if model == "experts" and (stage == 3 or world == 1 or fault == "reduction"):
        return False  # DeepSpeed refuses stage 3; one rank has all experts; two do not add up their gradients
    if way == "compiled" and fault == "forward" and setup != "fp16":
        return False  # compiled code calls no hook that is put on a module inside of it later
    if fault == "scale":  # DeepSpeed 0.19.8 does not scale the loss at stage 0, and never lowers torch_autocast's later
        if way == "ulysses":
            return False  # at the scale before the right one the sum over ranks overflows, and not a rank's gradient
        return (setup in ("fp16", "half") and stage > 0) or (setup == "autocast_fp16" and stage == 0)
    if fault == "reduction":  # later stages divide before they add up, but not by the parts of a sequence
        return setup == "fp16" and (stage == 0 or way == "ulysses") and world > (STAGES if way == "pipeline" else 1)
    return True


def _is_on_four(fault: str, model: str, kind: Kind) -> bool:
    """A smaller share on 4 ranks: two copies of what is shared out over two ranks."""
    if fault in ("frozen_weight", "buffer"):
        return False
    if kind.way == "dense":
        return model == "experts" and kind.setup in ("bf16", "bf16_fp32")
    return model == "transformer" and kind.setup == "bf16"


def representative(cases: Sequence[Case]) -> list[Case]:
    """A subset: see `covering` for plain engines; of the others each fault once, and a clean run in each way.

    Without options and loops; clean runs are shorter.
    """
    cases = [case for case in cases if case.fault != "refused" and case.world <= 2 and case.way not in OPTIONS]
    dense = [case for case in cases if case.kind in DENSE]
    others = [case for case in cases if case.kind not in DENSE]
    ways = list(dict.fromkeys((case.way, case.is_autocast) for case in others))
    few = []
    for number, (fault, way) in enumerate(_rotated(others, ways)):
        possible = [case for case in others if case.fault == fault]
        fitting = [case for case in possible if (case.way, case.is_autocast) == way] or possible
        few.append(fitting[number % len(fitting)])
    return [replace(case, clean_steps=CLEAN_STEPS_IN_TESTS) for case in covering(dense) + few]


def _rotated(cases: Sequence[Case], ways: Sequence[tuple[str, bool]]) -> Iterable[tuple[str, tuple[str, bool]]]:
    """Each way with a clean run, and each fault with the ways in turn."""
    yield from (("none", way) for way in ways)
    faults = [fault for fault in dict.fromkeys(case.fault for case in cases) if fault not in ("none", "scale")]
    for number, fault in enumerate(faults):
        yield fault, ways[number % len(ways)]


def covering(cases: Sequence[Case]) -> list[Case]:
    """A subset with every fault in every second kind of engine, and in these every pair of values of any two axes.

    Chosen greedily. Of two faults that follow one another each kind of engine has one.
    """
    kinds = list(dict.fromkeys(case.kind for case in cases))
    faults = list(dict.fromkeys(case.fault for case in cases))
    cases = [case for case in cases if (faults.index(case.fault) + kinds.index(case.kind)) % 2 == 0]
    missing = {pair for case in cases for pair in _pairs(case)}
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(missing.intersection(_pairs(case))))
        chosen.append(best)
        missing -= _pairs(best)
    return sorted(chosen, key=cases.index)


def _pairs(case: Case) -> set[tuple[tuple[str, object], ...]]:
    axes = (("fault", case.fault), ("model", case.model), ("kind", case.kind), ("world", case.world))
    return set(itertools.combinations(axes, 2))


@dataclass(frozen=True)
class Seen:
    """What a rank has seen.

    Attributes:
        verdict, provisional, recoverable: Of the report on the faulty step; None, False, None if there is none.
        first: kind, name, index and rank of its first offender.
        applied: Of every step, whether it was.
        raised: Whether `NumericsError` was.
        findings: kind and name of each.
        last: verdict and provisional of the last report.
        finite: Whether the weights were at the end.
        planted: Name and index of what must be named.
        named_scale, settled_at: The loss scale that the last report of a skipped step named, and that of the last step.
        alone: What becomes of the run without a fault and without a guard: "runs", or the error; None if not tried.
        same_bits: Whether the losses of the guarded run are, bit for bit, those without; None if not tried.
    """

    verdict: str | None
    provisional: bool
    recoverable: bool | None
    first: tuple[str, str, tuple[int, ...], int | None] | None
    applied: tuple[bool, ...]
    raised: bool
    findings: tuple[tuple[str, str], ...]
    last: tuple[str | None, bool]
    finite: bool
    planted: tuple[str, tuple[int, ...]]
    named_scale: float | None
    settled_at: float
    alone: str | None = None
    same_bits: bool | None = None

    @classmethod
    def of_refused(cls, verdict: str | None, alone: str) -> Seen:
        """What is seen of an engine that is refused."""
        return cls(verdict, False, None, None, (), False, (), (None, False), True, ("", ()), None, 0.0, alone)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Seen:
        """Reads what a worker has written."""
        first = values["first"]
        return cls(
            **{
                **values,
                "first": first and (first[0], first[1], tuple(first[2]), first[3]),
                "applied": tuple(values["applied"]),
                "findings": tuple(map(tuple, values["findings"])),
                "last": tuple(values["last"]),
                "planted": (values["planted"][0], tuple(values["planted"][1])),
            }
        )


def problems(case: Case, seen: Sequence[Seen]) -> list[str]:
    """Returns what is wrong with what the ranks have seen, in words; nothing if all is as it must be."""
    found = [f"ranks disagree: {one.verdict} {one.first}" for one in seen[1:] if _shared(one) != _shared(seen[0])]
    return found + list(_differences(case, seen[0]))


def _shared(seen: Seen) -> tuple[object, ...]:
    return seen.verdict, seen.provisional, seen.recoverable, seen.first, seen.applied, seen.raised, seen.last


def _differences(case: Case, seen: Seen) -> Iterable[str]:
    name, index = seen.planted
    for what, got, expected in (
        *_expected(case, seen, name, index),
        ("findings", _findings(case, seen), (("nonfinite", name),) if case.fault == "buffer" else ()),
        ("weights finite at the end", seen.finite, case.fault not in ("weight", "frozen_weight", "optimizer_state")),
    ):
        if got != expected:
            yield f"{what}: expected {expected}, got {got}"


def _findings(case: Case, seen: Seen) -> tuple[tuple[str, str], ...]:
    """What was found, but for what is true of some models: poisoned statistics, norms that train in bfloat16.

    Of several ranks one that does not hold a bad moment has seen that the update wrote the weight.
    """
    expected = ["statistics_restored", "lost_update"]
    if case.fault == "optimizer_state" and case.world > 1:
        expected.append("update_nonfinite")
    return tuple(finding for finding in seen.findings if finding[0] not in expected)


def _expected(case: Case, seen: Seen, name: str, index: tuple[int, ...]) -> Iterable[tuple[str, object, object]]:
    """What was seen, and what should have been, in the words of the design's table of verdicts."""
    yes, no = True, False
    before, after = (yes,) * (FAULTY_STEP - 1), (yes,) * (STEPS - FAULTY_STEP)
    first_but_rank = seen.first and seen.first[:3]
    first_but_index = seen.first and (*seen.first[:2], seen.first[3])
    one_bad_step = (*before, no, *after)
    if case.fault == "none":
        yield "verdict", seen.verdict, None
        yield "applied", seen.applied, (yes,) * case.clean_steps
        yield "same bits as without a guard", seen.same_bits in (yes, None), yes
    elif case.fault == "refused":
        yield "verdict", seen.verdict, "refused" if seen.alone == "runs" else None
    elif case.fault in ("weight", "frozen_weight"):
        yield "verdict", (seen.verdict, seen.raised), ("weights_nonfinite", yes)
        yield "first", seen.first, ("parameter", name, index, case.culprit)
        yield "applied", seen.applied, (*before, no)
    elif case.fault == "buffer":
        yield "verdict", (seen.verdict, seen.raised), ("weights_nonfinite", yes)
        yield "first", seen.first, ("buffer", name, index, 0)
        yield "applied", seen.applied, (no,)
    elif case.fault == "optimizer_state":  # the step after it writes it into the weight
        yield "verdict", (seen.verdict, seen.raised), ("optimizer_state_nonfinite", yes)
        yield "first", first_but_rank, ("optimizer_state", name, index)
        yield "applied", seen.applied, (*before, yes, no)
    elif case.fault == "input":
        yield "verdict", (seen.verdict, seen.recoverable), ("input_nonfinite", yes)
        yield "first", seen.first, ("input", name, index, case.culprit)
        yield "applied", seen.applied, one_bad_step
    elif case.fault == "loss":
        is_run_again = case.way == "pipeline"  # the engine has the loss function
        verdict, index = ("loss_nonfinite", (MICRO_BATCHES - 1,)) if is_run_again else ("undetermined", ())
        yield "verdict", (seen.verdict, seen.recoverable), (verdict, None)
        yield "first", seen.first, ("loss", "loss", index, case.culprit)
        yield "applied", seen.applied, one_bad_step
    elif case.fault == "forward":
        stays = case.has_large_weight
        everywhere = stays and case.stage == 3  # all ranks gather the weight from the one that has it
        yield "verdict", (seen.verdict, seen.recoverable), ("forward_nonfinite", None)
        yield "first", first_but_index, ("activation", name, 0 if everywhere else case.culprit)
        yield "applied", seen.applied, (*before, no, no, no, no) if stays else one_bad_step
    elif case.fault == "backward":
        yield "verdict", (seen.verdict, seen.recoverable, seen.provisional), ("backward_nonfinite", None, no)
        yield "first", first_but_index, ("gradient", name, 0)
        yield "applied", seen.applied, one_bad_step
    elif case.fault == "gradient":
        # One copy has nothing to be compared with; under stage 3 torch_autocast gathers other bits anew.
        is_comparable = case.copies > 1 and not (case.is_autocast and case.stage == 3)
        verdict = "rank_fault" if is_comparable else "undetermined"
        yield "verdict", (seen.verdict, seen.recoverable), (verdict, None)
        yield "first", seen.first, ("gradient", name, index, case.culprit)
        yield "applied", seen.applied, one_bad_step
    elif case.fault == "scale":
        yield "verdict", (seen.verdict, seen.recoverable), ("scale_too_high", yes)
        yield "settled", seen.last, ("scale_too_high", no)
        # Where finite micro-batches are too large as a sum, none is named.
        yield "settles at", seen.settled_at, seen.named_scale or (case.way == "pipeline" and seen.settled_at)
        yield "applied", (seen.applied[0], seen.applied[-1]), (no, yes)
    elif case.fault == "reduction":
        yield "verdict", (seen.verdict, seen.recoverable), ("reduction_overflow", yes)
        yield "first", first_but_rank, ("reduction", name, index)
        yield "applied", seen.applied, one_bad_step
