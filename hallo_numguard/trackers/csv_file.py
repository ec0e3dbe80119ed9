"""A CSV file as a tracker."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from hallo_numguard.core.errors import InvalidInput
from hallo_numguard.core.overflow_report import OverflowReport
from hallo_numguard.trackers.base import FIGURES

_COLUMNS = ("step", *FIGURES)


class CsvSink:
    """Appends one line per step to a file with a header; reports go to a file of the same name with `.txt` added.

    Args:
        path: Path of the file; an existing table is continued.
    """

    def __init__(self, path: str | None) -> None:
        if path is None:
            raise InvalidInput("expected the path of a file, as in csv:figures.csv")
        self._path = Path(path)
        self._checked = False  # whether the file there is such a table

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Appends a line. The file is whole after every step."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a+", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
            if file.tell() == 0:
                table.writeheader()
            elif not self._checked:
                file.seek(0)
                if next(csv.reader(file), None) != list(_COLUMNS):
                    raise InvalidInput(f"{self._path} is there already, and is no table of these figures")
            self._checked = True
            table.writerow({"step": step, **figures})

    def report(self, report: OverflowReport) -> None:
        """See `Sink`."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.with_name(f"{self._path.name}.txt").open("a", encoding="utf-8") as file:
            file.write(f"{report}\n\n")
