"""Reports and traces to be shown: real ones in goldens/ (two ranks, ZeRO-2 in fp16), and made ones of any size."""

from __future__ import annotations

import os
from pathlib import Path

from hallo_numguard.core.frames import Frame, Frames, Origin, TensorRecord, save
from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.core.records import GradientRecord, Offender, Record, StepRecord, Verdict

from paths import TESTS

GOLDENS = TESTS / "goldens"
LAST_STEP = [GOLDENS / f"overflow-step00000021-rank{rank}.json" for rank in (0, 1)]
REAL = [GOLDENS / "overflow-step00000019-rank0.json", *LAST_STEP]
HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "[/x][bold]shout",
    "\x1b]0;owned\x07\x1b[2Jgone\x00",
    "\u202etxt.exe\ud800",
    "{{ 7 * 7 }}%{x}$x$<b>bold</b>",
    "javascript:alert(1)//<a href='javascript:alert(1)'>",
    "long." * 2000,
)


def compare(path: Path, text: str) -> None:
    """Compares with a generated file; UPDATE_GOLDENS=1 writes it anew."""
    if os.environ.get("UPDATE_GOLDENS"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def offender(name: str, kind: str = "gradient", rank: int | None = 0) -> Offender:
    return Offender(kind, name, name.rpartition(".")[0], rank, (0, 1), 3, 0, 0, 0.5, 384, (24, 16), "float16")


def report(
    names: list[str], bad: list[str], steps: int = 5, first: Offender | None = None, step: int = 20
) -> OverflowReport:
    """A report whose last step is not finite in the parameters that `bad` names."""
    history = tuple(
        StepRecord(
            number,
            loss=2.0,
            loss_scale=2.0**16,
            absmax=8.0,
            norm=64.0,
            nonfinite=3 * len(bad) if number == step else 0,
            applied=number < step,
            limit=65504.0,
            parameters={name: GradientRecord(1.0 + number, 2.0, 3 * (number == step and name in bad)) for name in names}
            if len(names) < 100
            else _many(names, set(bad) if number == step else set(), float(number)),
        )
        for number in range(step - steps + 1, step + 1)
    )
    return OverflowReport(
        step,
        2.0**16,
        Verdict.WEIGHTS_NONFINITE,
        provisional=False,
        recoverable=False,
        first=first,
        offenders=tuple(map(offender, bad)),
        evidence=("the loss is not finite",),
        not_checked=(),
        advice="Repair it.",
        history=history,
    )


def _many(names: list[str], bad: set[str], absmax: float) -> dict[str, GradientRecord]:
    good, spoilt = GradientRecord(absmax, 2.0, 0), GradientRecord(absmax, 2.0, 3)
    return {name: spoilt if name in bad else good for name in names}


def tensor(name: str, absmax: float, nan: int = 0, pos_inf: int = 0, shape: tuple[int, ...] = (4, 16)) -> TensorRecord:
    bad = nan + pos_inf > 0
    return TensorRecord(
        name, shape, "float16", Record(nan, pos_inf, 0, absmax, absmax**2, 5 if bad else -1), (0, 5) if bad else ()
    )


def trace(layers: int = 3, calls: int = 2, prefix: str = "encoder") -> Frames:
    """Blocks with two modules inside; in the last call, layer 1's projection overflows, and NaN follows."""
    frames: list[Frame] = []
    for call in range(calls):
        for layer in range(layers):
            spoilt = call == calls - 1 and layer >= 1
            block = len(frames) + 2
            name = f"{prefix}.{layer}"
            origin = spoilt and layer == 1
            after = 4 if spoilt else 0
            arriving = 4 if spoilt and not origin else 0
            gradients = {"grad_outputs": (tensor("output[0]", 1e-3, nan=4 if call == calls - 1 else 0),)}
            for inner, cls, outputs in (
                ("norm", "LayerNorm", (tensor("output[0]", 2.0, nan=arriving),)),
                ("proj", "Linear", (tensor("output[0]", 9.0, nan=arriving, pos_inf=2 if origin else 0),)),
            ):
                frames.append(
                    Frame(
                        len(frames),
                        f"{name}.{inner}",
                        cls,
                        call,
                        block,
                        inputs=(tensor("input[0]", 1.5, nan=arriving),),
                        weights=(tensor("weight", 0.2, shape=(16, 16)),),
                        outputs=outputs,
                        **gradients,
                    )
                )
            whole = (tensor("output[0]", 9.0, nan=after),)
            frames.append(Frame(len(frames), name, "Block", call, None, outputs=whole, **gradients))
    bad = frames[-3 * layers + 4]
    first = Origin(
        bad.name,
        bad.cls,
        "forward",
        bad.call,
        (0, 5),
        "activation",
        bad.outputs[0],
        bad.position,
        (65504.0, float("inf")),
        "matmul, model.py:31",
    )
    return Frames(tuple(frames), first)


def write_report(folder: Path, one: OverflowReport, rank: int = 0) -> Path:
    path = folder / f"overflow-step{one.step:08d}-rank{rank}.json"
    path.write_text(one.to_json(), encoding="utf-8")
    return path


def write_trace(folder: Path, frames: Frames, name: str = "trace.jsonl.gz") -> Path:
    path = folder / name
    save(frames, path)
    return path


def hostile_report() -> OverflowReport:
    names = list(HOSTILE)
    one = report(names, names, first=offender(HOSTILE[0], kind="parameter"))
    return OverflowReport(
        **{
            **{name: getattr(one, name) for name in one.__dataclass_fields__},
            "evidence": tuple(HOSTILE),
            "advice": " ".join(HOSTILE[:4]),
            "environment": {"torch": HOSTILE[0], HOSTILE[1]: HOSTILE[2], "hides_nan": [HOSTILE[1]]},
        }
    )
