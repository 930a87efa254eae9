"""The comparison: models as rows, data sets and protocols as columns, the best of each column and who ties with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from sonoforge_trainer.contract import (
    CheckpointSummary,
    ContractError,
    Evidence,
    Score,
    is_validation_score,
    split_score,
)
from sonoforge_trainer.report.curves import is_headline
from sonoforge_trainer.report.runs import Measured, Run
from sonoforge_trainer.report.significance import Verdict, compared, same_samples
from sonoforge_trainer.storage import Storage, StorageError

_UNRANKED = ("health",)
"""Protocols whose numbers are not better the higher they are."""

_ROUNDED = 1e-5
"""Scores that an operator tells are rounded to six digits."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Model:
    """One row: a checkpoint, or a baseline."""

    name: str
    """What the row is called."""
    note: str
    """What it is."""
    scores: Mapping[str, Score]
    """By EVALUATION-PROTOCOL/METRIC, on test."""
    results: Mapping[str, Measured] = field(default_factory=dict)
    """Complete results by evaluation, as far as they are at hand."""


@dataclass(frozen=True)
class Cell:
    """One number, or none."""

    score: Score | None
    verdict: Verdict | None
    """How it stands to the best of its column; None where nothing is compared."""


@dataclass(frozen=True)
class Column:
    """One score of one data set."""

    name: str
    """EVALUATION-PROTOCOL/METRIC."""
    protocol: str
    metric: str
    cells: tuple[Cell, ...]
    """In the order of the models."""

    @property
    def headline(self) -> bool:
        """Whether the first table shows it."""
        return is_headline(self.metric) and self.protocol not in _UNRANKED


@dataclass(frozen=True)
class Table:
    """One data set."""

    evaluation: str
    models: tuple[Model, ...]
    """Those with a score here."""
    columns: tuple[Column, ...]

    @property
    def headlines(self) -> list[Column]:
        """Columns of the first table: all where none is a headline."""
        return [c for c in self.columns if c.headline] or list(self.columns)

    @property
    def groups(self) -> list[tuple[str, int]]:
        """(protocol, columns) of the first table, from left to right."""
        protocols = [c.protocol for c in self.headlines]
        return [(name, protocols.count(name)) for name in dict.fromkeys(protocols)]


def models_of(runs: Sequence[Run]) -> list[Model]:
    """Rows of the comparison: for each run the random start, the best and the last checkpoint; then the floors."""
    found: list[Model] = []
    for run in runs:
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        for checkpoint, what, note in _shown(run.summary.checkpoints):
            scores = {n: s for n, s in checkpoint.scores.items() if not is_validation_score(n)}
            found.append(
                Model(f"{prefix}{what}", f"step {checkpoint.ref.step}{note}", scores, run.results_of(checkpoint))
            )
    return found + _floors(runs)


def tables(models: Sequence[Model], storage: Storage) -> list[Table]:
    """One table for each data set that a model was scored on."""
    evidence = _Evidence(storage)
    names = sorted({name for model in models for name in model.scores})
    found = []
    for evaluation in dict.fromkeys(split_score(name)[0] for name in names):
        mine = [name for name in names if split_score(name)[0] == evaluation]
        rows = tuple(model for model in models if not model.scores.keys().isdisjoint(mine))
        columns = tuple(_column(name, rows, evidence) for name in sorted(mine, key=_order))
        found.append(Table(evaluation, rows, columns))
    return found


class _Evidence:
    """Outcomes of single samples, each document read once."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._read: dict[str, Evidence | None] = {}

    def of(self, model: Model, evaluation: str) -> Evidence | None:
        found = model.results.get(evaluation)
        if found is None or not found.result.artifacts.evidence:
            return None
        uri = found.beside(found.result.artifacts.evidence)
        if uri not in self._read:
            self._read[uri] = self._load(uri)
        return self._read[uri]

    def _load(self, uri: str) -> Evidence | None:
        try:
            return Evidence.from_json(self._storage.read(uri), where=uri)
        except (StorageError, ContractError) as error:
            log.warning("report.evidence_missing", uri=uri, reason=type(error).__name__)
            return None


def _shown(checkpoints: Sequence[CheckpointSummary]) -> list[tuple[CheckpointSummary, str, str]]:
    """(checkpoint, name, what is said of it) of the random start, the best and the last one."""
    scored = [c for c in checkpoints if c.scores]
    shown: list[tuple[CheckpointSummary, str, str]] = []
    if scored and scored[0].ref.step == 0:
        shown.append((scored[0], "random initialisation", ""))
    trained = [c for c in scored if c.ref.step > 0]
    best = next((c for c in trained if c.best), None)
    if best is not None:
        shown.append((best, "best checkpoint", ", the last one" if best is trained[-1] else ""))
    if trained and trained[-1] is not best:
        shown.append((trained[-1], "last checkpoint", ""))
    return shown


def _floors(runs: Sequence[Run]) -> list[Model]:
    """Floors and baselines by name. Runs on the same data have the same; one whose differ gets rows of its own."""
    found: dict[str, dict[str, Score]] = {}
    results: dict[str, dict[str, Measured]] = {}
    for run in runs:
        mine: dict[str, dict[str, Score]] = {}
        for key, score in run.summary.floors.items():
            floor, _, name = key.partition(":")
            mine.setdefault(floor, {})[name] = score
        for floor, scores in mine.items():
            known = found.get(floor, {})
            agrees = all(abs(known[name].value - s.value) < _ROUNDED for name, s in scores.items() if name in known)
            row = floor if agrees else f"{floor} ({run.name})"
            found.setdefault(row, {}).update(scores)
            results.setdefault(row, {}).update({m.evaluation: m for name, m in run.baselines if name == floor})
    return [Model(row.replace("-", " "), "baseline", scores, results[row]) for row, scores in sorted(found.items())]


def _column(name: str, models: Iterable[Model], evidence: _Evidence) -> Column:
    evaluation, protocol, metric = split_score(name)
    rows = list(models)
    scores = [model.scores.get(name) for model in rows]
    known = [number for number, score in enumerate(scores) if score is not None]
    if protocol in _UNRANKED or len(known) < 2:
        return Column(name, protocol, metric, tuple(Cell(score, None) for score in scores))
    best = max(known, key=lambda number: (s.value if (s := scores[number]) else 0.0, -number))
    cells = []
    for number, score in enumerate(scores):
        if score is None:
            cells.append(Cell(None, None))
        elif number == best:
            cells.append(Cell(score, Verdict("best")))
        else:
            first, second = (evidence.of(rows[n], evaluation) for n in (best, number))
            outcomes = same_samples(first, second, protocol) if first and second else None
            leader = scores[best]
            assert leader is not None
            cells.append(Cell(score, compared(leader, score, metric, outcomes)))
    return Column(name, protocol, metric, tuple(cells))


def _order(name: str) -> tuple[int, str]:
    """Classification before segmentation, health last."""
    protocol = split_score(name)[1]
    ranks = {"knn": 0, "linear": 1, "logreg": 2, "fewshot": 3, "finetune": 4, "segment-probe": 5, "segment": 6}
    return ranks.get(protocol, 9), name
