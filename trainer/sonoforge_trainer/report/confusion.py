"""Confusion matrices, as tables with a colour for each cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sonoforge_trainer.report.palette import HEAT
from sonoforge_trainer.report.runs import Evaluated

MAX_CLASSES = 24
"""A larger matrix cannot be read; its classes are listed by recall instead."""


@dataclass(frozen=True)
class Confusion:
    """Test samples of one classification by true class (rows) and predicted class (columns)."""

    evaluation: str
    protocol: str
    chosen: str
    """What was selected on validation."""
    classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    @property
    def fits(self) -> bool:
        """Whether it is small enough to be shown."""
        return len(self.classes) <= MAX_CLASSES

    @property
    def total(self) -> int:
        """Test samples."""
        return sum(map(sum, self.counts))

    def heat(self, row: int, column: int) -> int:
        """Share of the row's samples in this column, in steps of the palette."""
        total = sum(self.counts[row])
        return round(HEAT * self.counts[row][column] / total) if total else 0

    def recall(self, row: int) -> float | None:
        """Part of the class that was recognised; None where the test split has none of it."""
        total = sum(self.counts[row])
        return self.counts[row][row] / total if total else None


def confusions_of(results: Mapping[str, Evaluated]) -> list[Confusion]:
    """Every matrix in the results of one checkpoint; details of another form are passed over."""
    found = []
    for evaluation, one in results.items():
        for protocol, details in one.result.details.items():
            matrix = details.get("confusion") if isinstance(details, dict) else None
            if not isinstance(matrix, dict) or not _is_square(matrix):
                continue
            classes = tuple(sorted(matrix))
            counts = tuple(tuple(matrix[name]) for name in classes)
            found.append(Confusion(evaluation, protocol, one.result.chosen.get(protocol, ""), classes, counts))
    return found


def _is_square(matrix: dict[object, object]) -> bool:
    return bool(matrix) and all(
        isinstance(name, str) and isinstance(row, list) and len(row) == len(matrix) and all(type(c) is int for c in row)
        for name, row in matrix.items()
    )
