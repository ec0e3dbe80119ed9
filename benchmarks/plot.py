"""One picture: the fraction of the read limit, by candidate, dtype and size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from results import MANY, MANY_ONE, MIB, Run, Sample, size_label, threads_label

CACHED = 4 * MIB

_OURS, _PEER, _INK = "#0b6e4f", "#b8bec6", "#30363d"
_SHOWN = ("ours", "peer")
_LEFT_OUT = {MANY, MANY_ONE}


class MissingPlotting(Exception):
    """matplotlib is not installed."""


def require_matplotlib() -> None:
    """Raises MissingPlotting where no picture could be drawn: better before the run than after."""
    try:
        import matplotlib  # noqa: F401  (looks only whether it is there)
    except ImportError as error:
        raise MissingPlotting("--plot needs matplotlib: pip install 'hallo-numguard[bench]'") from error


def draw(run: Run, path: Path) -> None:
    """Writes the picture: a row of panels a size (4 MiB and the largest), a column a dtype."""
    require_matplotlib()
    from matplotlib.figure import Figure

    samples = [sample for sample in run.samples if sample.kind in _SHOWN and sample.candidate not in _LEFT_OUT]
    threads = min(sample.threads for sample in samples)
    samples = [sample for sample in samples if sample.threads == threads]
    sizes = _sizes({sample.size for sample in samples})
    samples = [sample for sample in samples if sample.size in sizes]
    leftmost = min(sample.fraction for sample in samples) / 2
    dtypes = list(dict.fromkeys(sample.dtype for sample in samples))
    labels = {sample.candidate: sample.label for sample in samples}
    height = 1.1 + len(sizes) * (0.5 + 0.24 * len(labels))
    figure = Figure(figsize=(2.6 + 3.2 * len(dtypes), height), layout="constrained")
    panels = figure.subplots(len(sizes), len(dtypes), sharex=True, sharey=True, squeeze=False)
    for row, size in enumerate(sizes):
        for column, dtype in enumerate(dtypes):
            shown = {sample.candidate: sample for sample in samples if sample.size == size and sample.dtype == dtype}
            _draw_panel(panels[row][column], labels, shown, leftmost)
            panels[row][column].set_title(f"{dtype}, {size_label(size)}", fontsize=10, color=_INK)
    figure.suptitle(
        f"Speed, as a fraction of reading the memory ({threads_label(threads)}; longer is faster)",
        fontsize=12,
        color=_INK,
    )
    figure.supxlabel(_caption(run.machine), fontsize=8, color=_INK)
    figure.savefig(path, dpi=150)


def _draw_panel(axes: Any, labels: dict[str, str], shown: dict[str, Sample], leftmost: float) -> None:
    for row, key in enumerate(labels):
        if key not in shown:
            continue
        sample = shown[key]
        ours = sample.kind == "ours"
        axes.barh(row, sample.fraction, color=_OURS if ours else _PEER, height=0.72)
        axes.annotate(
            f"{sample.fraction:.2g}",
            (sample.fraction, row),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            fontweight="bold" if ours else "normal",
            color=_INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )
    axes.axvline(1.0, color="#c0392b", linewidth=1, linestyle="--", zorder=0.9)
    axes.set_xscale("log")
    axes.set_xlim(leftmost, 4.0)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(labels)), list(labels.values()), fontsize=8, color=_INK)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="both", length=0, labelsize=8, labelcolor=_INK)
    axes.grid(axis="x", color="#e6e8eb", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _sizes(measured: set[int]) -> list[int]:
    """The size in the cache, if it was measured, and the largest."""
    return sorted({max(measured), *({CACHED} & measured)})


def _caption(machine: dict[str, str]) -> str:
    names = ("cpu", "instruction set", "torch", "deepspeed")
    facts = [f"{name} {machine[name]}" for name in names if name in machine]
    return "dashed: the memory-read limit   |   " + ", ".join(facts)
