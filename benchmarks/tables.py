"""What a run found, on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from results import Run, Sample, Target, join, size_label, threads_label
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

WIDTH = 176  # where the output is not a terminal
_INACCURATE = 0.01  # relative; bfloat16 itself resolves 0.004
_STYLES = {"limit": "dim", "hint": "dim", "ours": "bold green", "peer": ""}


def print_header(console: Console, run: Run, time: str) -> None:
    """Prints the machine, a line a fact, and what the columns mean; `time` says how calls are timed."""
    for name, value in run.machine.items():
        console.print(f"[bold]{escape(name)}[/bold]: {escape(value)}", highlight=False)
    console.print(
        f"{time} of limit: {run.limit}, over the time of the candidate. "
        "ours x: how many times as fast our tensor_stats is. "
        "All are medians over rounds in which the candidates take turns.",
        style="dim",
    )


def print_table(console: Console, samples: Sequence[Sample]) -> None:
    """Prints the samples of one size and number of threads: a row each, 3 or 4 columns a dtype."""
    first = samples[0]
    dtypes = list(dict.fromkeys(sample.dtype for sample in samples))
    columns = _COLUMNS if first.host_us is None else _COLUMNS | _HOST_COLUMN
    title = join(size_label(first.size), threads_label(first.threads), _segments(samples))
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for dtype in dtypes:
        for name in columns:
            table.add_column(name.format(dtype=dtype), justify="right", no_wrap=True)
    cells = {(sample.candidate, sample.dtype): sample for sample in samples}
    labels = {sample.candidate: sample for sample in samples}
    for key, known in labels.items():
        row = [Text(known.label)]
        for dtype in dtypes:
            sample = cells.get((key, dtype))
            row.extend(Text("-" if sample is None else cell(sample)) for cell in columns.values())
        table.add_row(*row, style=_STYLES[known.kind])
    console.print(table)
    _print_inaccurate(console, samples)


def print_skipped(console: Console, skipped: dict[str, str]) -> None:
    """Prints which candidates were left out, and why."""
    for name, reason in skipped.items():
        console.print(f"[yellow]left out[/yellow]: {escape(name)}: {escape(reason)}")


def print_targets(console: Console, targets: Sequence[Target]) -> None:
    """Prints what was promised and what was found."""
    table = Table(title="Targets", title_justify="left", title_style="bold")
    table.add_column("promise")
    table.add_column("found")
    table.add_column("", no_wrap=True)
    for target in targets:
        word, style = {True: ("met", "green"), False: ("missed", "red"), None: ("not measured", "dim")}[target.met]
        table.add_row(escape(target.promise), escape(target.figure), Text(word, style=style))
    console.print(table)


def print_run(console: Console, run: Run) -> None:
    """Prints all that follows the tables."""
    print_skipped(console, run.skipped)
    print_targets(console, run.targets)


def _print_inaccurate(console: Console, samples: Sequence[Sample]) -> None:
    """Says whose norm is far from the true one, on data that any gradient could be."""
    for sample in samples:
        if sample.norm_error is not None and sample.norm_error > _INACCURATE:
            console.print(
                f"norm off by {sample.norm_error:.1%}: {escape(sample.label)}, {sample.dtype}",
                style="yellow",
                highlight=False,
            )


def _segments(samples: Sequence[Sample]) -> str:
    counts = sorted({sample.segments for sample in samples})
    return " or ".join(f"{count:,}" for count in counts) + " segments"


def _fraction(value: float) -> str:
    """Two digits after the point, or two that are not zero."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _significant(value: float | None) -> str:
    """Three digits or all before the point; a dash if there is no value."""
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


_COLUMNS: dict[str, Callable[[Sample], str]] = {
    "{dtype} us": lambda sample: _significant(sample.median_us),
    "of limit": lambda sample: _fraction(sample.fraction),
    "ours x": lambda sample: _significant(sample.speedup),
}
_HOST_COLUMN: dict[str, Callable[[Sample], str]] = {"host us": lambda sample: _significant(sample.host_us)}
