"""From a RunSummary and what the run left in storage to the report page."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import structlog

from sonoforge_trainer.contract import (
    METRICS,
    CheckpointSummary,
    ContractError,
    EvaluationResult,
    RunSummary,
    Score,
    is_validation_score,
    selection_score,
    split_score,
)
from sonoforge_trainer.report.charts import Series, line_chart
from sonoforge_trainer.storage import Storage, StorageError

log = structlog.get_logger(__name__)

_MAX_POINTS = 600
_DASHES = ("dashed", "dotted", "dash-dot")
_LOSS_PARTS = ("loss", "loss_dino", "loss_ibot", "loss_koleo")
_CURVES = (
    ("Learning rate", ("lr",), False),
    ("Gradient norms", ("grad_norm_backbone", "grad_norm_dino_head", "grad_norm_ibot_head"), True),
    ("Teacher entropy (nats)", ("teacher_entropy",), False),
    ("Images per second", ("samples_per_second",), False),
    ("Waiting for data (part of the step)", ("data_wait",), False),
    ("Processes", ("world_size",), False),
)


@dataclass(frozen=True)
class Picture:
    """One image of the page, embedded."""

    checkpoint: str
    """Id of the checkpoint it belongs to."""
    step: int
    """Steps of that checkpoint."""
    name: str
    """File name beside the result."""
    data_url: str
    """The picture itself, as a data: URL."""


@dataclass(frozen=True)
class Row:
    """One score of the comparison: the random start, the last and the best checkpoint."""

    name: str
    """EVALUATION-PROTOCOL/METRIC."""
    random: Score | None
    """Of the random initialisation, where it was evaluated."""
    last: Score | None
    """Of the newest evaluated checkpoint."""
    best: Score | None
    """Of the best checkpoint."""
    floors: tuple[tuple[str, Score], ...]
    """(floor, score) of each method without learning."""

    @property
    def margin(self) -> float | None:
        """Last checkpoint minus random initialisation."""
        return self.last.value - self.random.value if self.last and self.random else None


def render(summary: RunSummary, storage: Storage) -> str:
    """The page as HTML. What cannot be read any more is left out and named in the log."""
    records = metric_records(summary, storage)
    results = evaluation_results(summary, storage)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["stamp"] = _stamp
    template = environment.from_string(resources.files(__package__).joinpath("page.html.j2").read_text())
    return template.render(
        summary=summary,
        config=json.dumps(summary.training.document(), indent=1),
        config_digest=summary.training.digest(),
        names=_listed(summary),
        deciding=deciding(summary),
        rows=comparison(summary),
        loss_chart=_chart("Loss parts", records, _LOSS_PARTS),
        charts=[(title, svg) for title, names, log_y in _CURVES if (svg := _chart(title, records, names, log_y=log_y))],
        score_charts=score_charts(summary),
        pictures=pictures(summary, results, storage),
        restarts=sorted(summary.restarts.items()),
        feature_passes=sum(r.feature_passes for _, r in results),
        evaluations=len(results),
    )


def metric_records(summary: RunSummary, storage: Storage) -> list[dict[str, Any]]:
    """Every metric record that was committed with a checkpoint, in order of steps, each step once.

    Retention deletes states and manifests, and leaves the logs.
    """
    by_step: dict[int, dict[str, Any]] = {}
    for checkpoint in summary.checkpoints:
        try:
            text = storage.read(f"{checkpoint.ref.uri}/{METRICS}")
        except StorageError as error:
            log.warning("report.metrics_missing", checkpoint=checkpoint.ref.id, reason=type(error).__name__)
            continue
        for line in text.splitlines():
            record = json.loads(line)
            by_step[record["step"]] = record
    return [by_step[step] for step in sorted(by_step)]


def evaluation_results(summary: RunSummary, storage: Storage) -> list[tuple[CheckpointSummary, EvaluationResult]]:
    """The complete results of every evaluation that succeeded."""
    found = []
    for checkpoint in summary.checkpoints:
        for uri in checkpoint.results:
            try:
                found.append((checkpoint, EvaluationResult.from_json(storage.read(uri), where=uri)))
            except (StorageError, ContractError) as error:
                log.warning("report.result_missing", checkpoint=checkpoint.ref.id, reason=type(error).__name__)
    return found


def score_names(summary: RunSummary) -> list[str]:
    """Every score that any checkpoint has, without those on validation."""
    return sorted({name for c in summary.checkpoints for name in c.scores if not is_validation_score(name)})


def deciding(summary: RunSummary) -> str | None:
    """The score that the best checkpoint was chosen by, or None where none was chosen."""
    if summary.best_by is None or not any(c.best for c in summary.checkpoints):
        return None
    return selection_score(summary.best_by)


def comparison(summary: RunSummary) -> list[Row]:
    """For every score that is shown: random initialisation (step 0), last checkpoint, best checkpoint, floors."""
    scored = [c for c in summary.checkpoints if c.scores]
    if not scored:
        return []
    first = scored[0] if scored[0].ref.step == 0 else None
    best = next((c for c in scored if c.best), None)
    return [
        Row(
            name=name,
            random=first.scores.get(name) if first else None,
            last=scored[-1].scores.get(name),
            best=best.scores.get(name) if best else None,
            floors=tuple((f, s) for f, s in _floors_of(name, summary.floors)),
        )
        for name in score_names(summary)
    ]


def score_charts(summary: RunSummary) -> list[tuple[str, str]]:
    """One chart for each evaluation and metric: the protocols' scores against samples seen, their floors as lines.

    A floor has the colour of its protocol.
    """
    charts: dict[tuple[str, str], list[Series]] = {}
    last = max((c.ref.samples for c in summary.checkpoints), default=0)
    floor_names = sorted({key.partition(":")[0] for key in summary.floors})
    dashes = {floor: _DASHES[number % len(_DASHES)] for number, floor in enumerate(floor_names)}
    for name in score_names(summary):
        evaluation, protocol, metric = split_score(name)
        points = [(float(c.ref.samples), c.scores[name].value) for c in summary.checkpoints if name in c.scores]
        series = charts.setdefault((evaluation, metric), [])
        colour = sum(not one.dash for one in series)
        series.append(Series(protocol, points, markers=True, colour=colour))
        for floor, score in _floors_of(name, summary.floors):
            line = [(0.0, score.value), (float(last), score.value)]
            series.append(Series(f"{protocol} on {floor}", line, colour=colour, dash=dashes[floor]))
    found = []
    for (evaluation, metric), series in sorted(charts.items()):
        title = f"{evaluation}: {metric}"
        svg = line_chart(title, series, x_label="samples seen")
        if svg:
            found.append((title, svg))
    return found


def pictures(
    summary: RunSummary, results: Iterable[tuple[CheckpointSummary, EvaluationResult]], storage: Storage
) -> list[Picture]:
    """The PCA pictures of the first, the best and the last checkpoint."""
    scored = [c for c in summary.checkpoints if c.results]
    shown = {c.ref.id for c in [*scored[:1], *scored[-1:], *(c for c in scored if c.best)]}
    found = []
    for checkpoint, result in results:
        if checkpoint.ref.id not in shown:
            continue
        folder = result.request.result_uri.rpartition("/")[0]
        for name in result.pictures:
            try:
                data = storage.read(f"{folder}/{name}")
            except StorageError as error:
                log.warning("report.picture_missing", checkpoint=checkpoint.ref.id, reason=type(error).__name__)
                continue
            url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
            found.append(Picture(checkpoint.ref.id, checkpoint.ref.step, result.request.evaluation.name, url))
    return sorted(found, key=lambda p: (p.name, p.step))


def _listed(summary: RunSummary) -> list[str]:
    """The scores of the table of checkpoints: with the one that decided, so that the choice can be followed."""
    names, decided = score_names(summary), deciding(summary)
    return names if decided is None or decided in names else sorted([*names, decided])


def _floors_of(name: str, floors: Mapping[str, Score]) -> list[tuple[str, Score]]:
    """Floors of a score: what `EVALUATION-PROTOCOL/METRIC` is without learning is called `FLOOR:NAME`."""
    return [(key.partition(":")[0], score) for key, score in sorted(floors.items()) if key.partition(":")[2] == name]


def _chart(title: str, records: list[dict[str, Any]], names: Iterable[str], *, log_y: bool = False) -> str:
    stride = max(1, len(records) // _MAX_POINTS)
    thinned = records[::stride]
    series = [
        Series(name.removeprefix("loss_").removeprefix("grad_norm_").replace("_", " "), points)
        for name in names
        if (points := [(float(r["samples"]), float(r[name])) for r in thinned if r.get(name) is not None])
    ]
    return line_chart(title, series, x_label="samples seen", log_y=log_y) if series else ""


def _stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds)) if seconds else "–"
