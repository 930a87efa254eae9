"""The scores of a run's checkpoints beside those of its baselines and floors, as a table in Markdown."""

from __future__ import annotations

from sonoforge_trainer.contract import EvalSuiteSpec, RunSummary, Score
from sonoforge_trainer.report.comparison import Cell, Column, models_of, tables
from sonoforge_trainer.report.runs import read_run
from sonoforge_trainer.storage import Storage

_MARKS = {"best": "**{}**", "tied": "{} =", "worse": "{}", "unknown": "{} ?"}
_METRICS = ("balanced_accuracy", "dice_foreground", "rankme")
"""Ends of the names of the metrics that are shown: one for each protocol."""
_PARTS = ("knn_dice_foreground", "logreg_dice_foreground")
"""Of `segment-probe`, which reports the better one of them on validation, too."""

_CHOSEN_BY = ("val_balanced_accuracy", "val_dice_foreground", "rankme")
"""Metrics of the course of a run; the last one needs no labels."""


def comparison(summary: RunSummary, suite: EvalSuiteSpec, storage: Storage) -> str:
    """A row for each score on test, a column for each model.

    The best of a row is bold. `=`: on the same test samples the difference to it may be chance, compared as on the page
    of the run. Intervals are the 95 % ones of the results.
    """
    models = models_of([read_run(summary, storage)])
    by_name = {table.evaluation: table for table in tables(models, storage)}
    names = [model.name for model in models]
    lines = ["| data set | protocol | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for evaluation in suite.evaluations:
        table = by_name.get(evaluation.name)
        if table is None:
            continue
        measured = [model.name for model in table.models]
        for column in table.columns:
            if _shown(column):
                cells = dict(zip(measured, column.cells, strict=True))
                lines.append(_line(evaluation.name, column, [cells.get(name) for name in names]))
    return "\n".join(lines)


def course(summary: RunSummary) -> str:
    """A row for each checkpoint, a column for each score on validation that all have: by these recipes are chosen."""
    common = set.intersection(*(set(checkpoint.scores) for checkpoint in summary.checkpoints))
    names = [name for name in sorted(common) if name.rpartition("/")[2] in _CHOSEN_BY]
    lines = ["| images | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for checkpoint in summary.checkpoints:
        cells = [f"{checkpoint.scores[name].value:.3g}" for name in names]
        lines.append(f"| {checkpoint.ref.samples:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(column: Column) -> bool:
    return column.metric.endswith(_METRICS) and column.metric not in _PARTS


def _line(evaluation: str, column: Column, cells: list[Cell | None]) -> str:
    return f"| {evaluation} | {column.protocol} {column.metric} | " + " | ".join(_text(cell) for cell in cells) + " |"


def _text(cell: Cell | None) -> str:
    if cell is None or cell.score is None:
        return ""
    return _MARKS[cell.verdict.relation].format(_number(cell.score)) if cell.verdict else _number(cell.score)


def _number(score: Score) -> str:
    if score.low is None or score.high is None:
        return f"{score.value:.3g}"
    return f"{score.value:.3f} ({score.low:.3f} to {score.high:.3f})"
