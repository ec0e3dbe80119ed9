"""One picture: the fraction of the read limit, by candidate, dtype and size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from figures import MANY_SEGMENTS, Run, Sample, threads_label
from output import MIB, size_label

MAX_CACHED_BYTES = 4 * MIB  # size that stands for buckets that stay in a cache

_OURS, _PEER, _INK = "#0b6e4f", "#b8bec6", "#30363d"
_SHOWN = ("ours", "peer")
_FACTS = ("instruction set", "driver_version", "cuda", "torch", "triton", "deepspeed")


class MissingPlotting(Exception):
    """matplotlib is not installed."""


def require_matplotlib() -> None:
    """Raises MissingPlotting where no picture could be drawn: better before the run than after."""
    try:
        import matplotlib  # noqa: F401  (looks only whether it is there)
    except ImportError as error:
        raise MissingPlotting("--plot needs matplotlib: pip install 'hallo-numguard[bench]'") from error


def draw(run: Run, path: Path) -> None:
    """Writes the picture: a row of panels a size (one in a cache and the largest), a column a dtype."""
    require_matplotlib()
    from matplotlib.figure import Figure

    samples = [sample for sample in run.samples if sample.kind in _SHOWN and sample.segments != MANY_SEGMENTS]
    threads = min((sample.threads for sample in samples if sample.threads is not None), default=None)
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
    conditions = ", ".join([run.device, *threads_label(threads)])
    figure.suptitle(f"Speed, as a fraction of the read limit; longer is faster\n{conditions}", fontsize=12, color=_INK)
    figure.supxlabel(_caption(run), fontsize=8, color=_INK)
    figure.savefig(path, dpi=150)


def _draw_panel(axes: Any, labels: dict[str, str], shown: dict[str, Sample], leftmost: float) -> None:
    rows = {row: shown[key] for row, key in enumerate(labels) if key in shown}
    bars = axes.barh(
        list(rows),
        [sample.fraction for sample in rows.values()],
        color=[_OURS if sample.kind == "ours" else _PEER for sample in rows.values()],
        height=0.72,
    )
    opaque = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # some lie on the line of the limit
    axes.bar_label(bars, fmt="%.2g", padding=3, fontsize=7.5, color=_INK, bbox=opaque)
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
    """The largest that stays in a cache, if any was measured, and the largest of all."""
    cached = [size for size in measured if size <= MAX_CACHED_BYTES]
    return sorted({max(measured), *([max(cached)] if cached else [])})


def _caption(run: Run) -> str:
    facts = [f"{name} {run.machine[name]}" for name in _FACTS if name in run.machine]
    return f"dashed, the read limit: {run.limit}\n{', '.join(facts)}"
