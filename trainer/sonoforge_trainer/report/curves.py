"""The charts of the page: scores and training values against samples seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sonoforge_trainer.contract import Score, is_validation_score, split_score
from sonoforge_trainer.report.charts import Series, line_chart
from sonoforge_trainer.report.runs import Run
from sonoforge_trainer.report.timeline import marks_of, samples_range

_MAX_POINTS = 600
_DASHES = ("dashed", "dotted", "dash-dot")
_HEADLINES = ("f1_macro", "dice_foreground", "rankme")
_PARTS = ("knn_dice_foreground", "logreg_dice_foreground")
"""Scores of the methods of a protocol that reports the better one, too."""
_LOSSES = ("Loss parts", ("loss", "loss_dino", "loss_ibot", "loss_koleo"), False)
_CURVES = (
    _LOSSES,
    ("Learning rate", ("lr",), False),
    ("Gradient norms", ("grad_norm_backbone", "grad_norm_dino_head", "grad_norm_ibot_head"), True),
    ("Teacher entropy (nats)", ("teacher_entropy",), False),
    ("Images per second", ("samples_per_second",), False),
    ("Waiting for data (part of the step)", ("data_wait",), False),
)


def score_charts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(title, SVG) for each evaluation and metric: the protocols of every run, their floors as lines.

    A floor has the colour of its protocol in the first run. The metrics that the comparison shows come first.
    """
    charts: dict[tuple[str, str], list[Series]] = {}
    floors: Mapping[str, Score] = {key: score for run in reversed(runs) for key, score in run.summary.floors.items()}
    last = max((c.ref.samples for run in runs for c in run.summary.checkpoints), default=0)
    dashes = {f: _DASHES[n % len(_DASHES)] for n, f in enumerate(sorted({key.partition(":")[0] for key in floors}))}
    for number, run in enumerate(runs):
        checkpoints = run.summary.checkpoints
        for name in sorted({n for c in checkpoints for n in c.scores if not is_validation_score(n)}):
            evaluation, protocol, metric = split_score(name)
            series = charts.setdefault((evaluation, metric), [])
            colour = sum(not one.dash for one in series)
            points = [(float(c.ref.samples), c.scores[name].value) for c in checkpoints if name in c.scores]
            label = f"{run.name} {protocol}" if len(runs) > 1 else protocol
            series.append(Series(label, points, markers=True, colour=colour))
            if number == 0:
                for floor, score in floors_of(name, floors):
                    line = [(0.0, score.value), (float(last), score.value)]
                    series.append(Series(f"{protocol} on {floor}", line, colour=colour, dash=dashes[floor]))
    marks = marks_of(runs[0].summary) if len(runs) == 1 else []
    found = []
    for (evaluation, metric), series in sorted(charts.items(), key=lambda item: (not is_headline(item[0][1]), item[0])):
        title = f"{evaluation}: {metric}"
        svg = line_chart(
            title, series, x_label="samples seen", marks=marks, x_range=(0.0, float(last)) if last else None
        )
        if svg:
            found.append((title, svg))
    return found


def is_headline(metric: str) -> bool:
    """Whether a metric is shown first: macro F1 and foreground Dice of any protocol, and RankMe."""
    return metric.endswith(_HEADLINES) and metric not in _PARTS


def training_charts(run: Run) -> list[tuple[str, str]]:
    """(title, SVG) of the loss parts and the other values of training; those that were not logged are left out."""
    marks, x_range = marks_of(run.summary), samples_range(run.summary)
    found = []
    for title, names, log_y in _CURVES:
        series = _series(run.records, names)
        svg = line_chart(title, series, x_label="samples seen", log_y=log_y, marks=marks, x_range=x_range)
        if series and svg:
            found.append((title, svg))
    return found


def floors_of(name: str, floors: Mapping[str, Score]) -> list[tuple[str, Score]]:
    """Floors of a score: what `EVALUATION-PROTOCOL/METRIC` is without learning is called `FLOOR:NAME`."""
    return [(key.partition(":")[0], score) for key, score in sorted(floors.items()) if key.partition(":")[2] == name]


def _series(records: Sequence[dict[str, Any]], names: Iterable[str]) -> list[Series]:
    stride = max(1, len(records) // _MAX_POINTS)
    return [
        Series(name.removeprefix("loss_").removeprefix("grad_norm_").replace("_", " "), points)
        for name in names
        if (points := [(float(r["samples"]), float(r[name])) for r in records[::stride] if r.get(name) is not None])
    ]
