"""The protocols of an evaluation on one set of features."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import structlog
import torch

from sonoforge_trainer.contract import Evaluation, Protocol, Score
from sonoforge_trainer.evaluate.dataset import Selection
from sonoforge_trainer.evaluate.errors import EvaluationDataError
from sonoforge_trainer.evaluate.features import FeatureModel, FeatureSet
from sonoforge_trainer.evaluate.fewshot import fewshot
from sonoforge_trainer.evaluate.health import health
from sonoforge_trainer.evaluate.knn import knn
from sonoforge_trainer.evaluate.linear import linear
from sonoforge_trainer.evaluate.logreg import logreg
from sonoforge_trainer.evaluate.problem import SPLITS, Finding, Problem
from sonoforge_trainer.evaluate.segment import SegmentProblem, segment_probe

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Material:
    """What the protocols of an evaluation work on."""

    evaluation: Evaluation
    model: FeatureModel
    features: FeatureSet
    selection: Selection
    device: torch.device
    teacher_entropy: float | None = None
    """What training logged last before the checkpoint, in nats; None where it logged nothing, and for floors."""


class Clock:
    """Seconds by name."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._now = now

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time of the block."""
        start = self._now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start


def run_protocols(material: Material, clock: Clock, protocols: Iterable[Protocol]) -> dict[str, Finding]:
    """Run protocols on the same features."""
    findings: dict[str, Finding] = {}
    for protocol in protocols:
        with clock.measure(protocol):
            findings[protocol] = _PROTOCOLS[protocol](material)
        _log.info("protocol done", evaluation=material.evaluation.name, protocol=protocol)
    return findings


def named_scores(findings: Mapping[str, Finding]) -> dict[str, Score]:
    """PROTOCOL/METRIC to score."""
    return {f"{protocol}/{metric}": s for protocol, finding in findings.items() for metric, s in finding.scores.items()}


def problem_of(material: Material, protocol: str) -> Problem:
    """The labelled samples with the inputs that a protocol may choose from. Raises EvaluationDataError."""
    evaluation = material.evaluation
    labelled = material.selection.where(lambda record: bool(record.fields.get(evaluation.label, "")))
    labelled.require_splits(SPLITS, f"{protocol} on the field {evaluation.label!r}")
    classes, targets = labelled.labels(evaluation.label)
    if len(classes) < 2:
        raise EvaluationDataError(f"the field {evaluation.label!r} has one class only; there is nothing to tell apart")
    inputs = {
        name: {split: material.features.joined(parts, rows) for split, rows in labelled.rows.items()}
        for name, parts in material.model.inputs[protocol].items()
    }
    return Problem(classes, inputs, targets, labelled.groups())


def _knn(material: Material) -> Finding:
    e = material.evaluation
    return knn(
        problem_of(material, "knn"),
        e.k,
        temperature=e.temperature,
        resamples=e.bootstrap,
        seed=e.seed,
        device=material.device,
    )


def _linear(material: Material) -> Finding:
    e = material.evaluation
    problem = problem_of(material, "linear")
    return linear(problem, epochs=e.linear_epochs, resamples=e.bootstrap, seed=e.seed, device=material.device)


def _logreg(material: Material) -> Finding:
    e = material.evaluation
    return logreg(problem_of(material, "logreg"), resamples=e.bootstrap, seed=e.seed)


def _fewshot(material: Material) -> Finding:
    e = material.evaluation
    problem = problem_of(material, "fewshot")
    return fewshot(problem, e.shots, seeds=e.seeds, temperature=e.temperature, seed=e.seed, device=material.device)


def segment_problem_of(material: Material) -> SegmentProblem:
    """The samples with masks. Raises EvaluationDataError."""
    masked = material.selection.where(lambda record: record.mask is not None)
    masked.require_splits(SPLITS, "segment-probe (samples with masks)")
    return SegmentProblem(
        material.selection.table.manifest.mask_classes,
        material.model.grid,
        {split: material.features.patches_of(rows) for split, rows in masked.rows.items()},
        {split: [r.mask for r in masked.records(split) if r.mask is not None] for split in masked.rows},
        masked.groups(),
    )


def _segment_probe(material: Material) -> Finding:
    e = material.evaluation
    problem = segment_problem_of(material)
    return segment_probe(
        problem, e.k, temperature=e.temperature, resamples=e.bootstrap, seed=e.seed, device=material.device
    )


def _health(material: Material) -> Finding:
    rows = np.sort(np.concatenate(list(material.selection.rows.values())))
    records = [material.selection.table.records[row] for row in rows]
    ((parts),) = material.model.inputs["health"].values()
    features = material.features.joined(parts, rows)
    return health(
        features,
        [r.clip for r in records],
        [r.patient for r in records],
        material.device,
        teacher_entropy=material.teacher_entropy,
    )


_PROTOCOLS: Mapping[Protocol, Callable[[Material], Finding]] = {
    "knn": _knn,
    "linear": _linear,
    "logreg": _logreg,
    "fewshot": _fewshot,
    "segment-probe": _segment_probe,
    "health": _health,
}
