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
from sonoforge_trainer.evaluate.dataset import Record, Selection, passes
from sonoforge_trainer.evaluate.errors import EvaluationDataError
from sonoforge_trainer.evaluate.features import FeatureModel, FeatureSet
from sonoforge_trainer.evaluate.fewshot import fewshot
from sonoforge_trainer.evaluate.finetune import FinetuneTask, finetune
from sonoforge_trainer.evaluate.health import health
from sonoforge_trainer.evaluate.knn import knn
from sonoforge_trainer.evaluate.linear import linear
from sonoforge_trainer.evaluate.logreg import logreg
from sonoforge_trainer.evaluate.metrics import Ints
from sonoforge_trainer.evaluate.problem import SPLITS, Finding, Problem
from sonoforge_trainer.evaluate.segment import SegmentProblem, segment_probe
from sonoforge_trainer.evaluate.segmentation import SegmentTask, segment
from sonoforge_trainer.evaluate.tuning import Tunable

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Material:
    """What the protocols of an evaluation work on."""

    evaluation: Evaluation
    model: FeatureModel
    features: FeatureSet
    selection: Selection
    device: torch.device
    tunable: Tunable | None = None
    """The backbone with its images, for the protocols that train it; None for floors."""
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


def needs_image(evaluation: Evaluation, record: Record) -> bool:
    """Whether one of the protocols that train on images will ask for this sample's."""
    masked = "segment" in evaluation.protocols and record.mask is not None
    labelled = "finetune" in evaluation.protocols and bool(record.fields.get(evaluation.label, ""))
    return (masked or labelled) and passes(record, evaluation)


def labelled(material: Material, protocol: str) -> tuple[Selection, tuple[str, ...], dict[str, Ints]]:
    """The labelled samples, their classes and the class of each by split. Raises EvaluationDataError."""
    label = material.evaluation.label
    selection = material.selection.where(lambda record: bool(record.fields.get(label, "")))
    selection.require_splits(SPLITS, f"{protocol} on the field {label!r}")
    classes, targets = selection.labels(label)
    if len(classes) < 2:
        raise EvaluationDataError(f"the field {label!r} has one class only; there is nothing to tell apart")
    return selection, classes, targets


def masked(material: Material, protocol: str) -> tuple[Selection, dict[str, list[bytes]]]:
    """The samples with masks, and their masks by split. Raises EvaluationDataError."""
    selection = material.selection.where(lambda record: record.mask is not None)
    selection.require_splits(SPLITS, f"{protocol} (samples with masks)")
    return selection, {s: [r.mask for r in selection.records(s) if r.mask is not None] for s in selection.rows}


def problem_of(material: Material, protocol: str) -> Problem:
    """The labelled samples with the inputs that a protocol may choose from. Raises EvaluationDataError."""
    selection, classes, targets = labelled(material, protocol)
    inputs = {
        name: {split: material.features.joined(parts, rows) for split, rows in selection.rows.items()}
        for name, parts in material.model.inputs[protocol].items()
    }
    return Problem(classes, inputs, targets, selection.groups())


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
    return fewshot(
        problem,
        e.shots,
        seeds=e.seeds,
        temperature=e.temperature,
        resamples=e.bootstrap,
        seed=e.seed,
        device=material.device,
    )


def segment_problem_of(material: Material) -> SegmentProblem:
    """The samples with masks. Raises EvaluationDataError."""
    selection, masks = masked(material, "segment-probe")
    return SegmentProblem(
        selection.table.manifest.mask_classes,
        material.model.grid,
        {split: material.features.patches_of(rows) for split, rows in selection.rows.items()},
        masks,
        selection.groups(),
    )


def _segment_probe(material: Material) -> Finding:
    e = material.evaluation
    problem = segment_problem_of(material)
    return segment_probe(
        problem, e.k, temperature=e.temperature, resamples=e.bootstrap, seed=e.seed, device=material.device
    )


def _segment(material: Material) -> Finding:
    e = material.evaluation
    selection, masks = masked(material, "segment")
    assert material.tunable is not None
    task = SegmentTask(selection.table.manifest.mask_classes, selection.rows, masks, selection.groups())
    return segment(material.tunable, task, e.segment, draws=e.seeds, resamples=e.bootstrap, seed=e.seed)


def _finetune(material: Material) -> Finding:
    e = material.evaluation
    selection, classes, targets = labelled(material, "finetune")
    assert material.tunable is not None
    task = FinetuneTask(classes, selection.rows, targets, selection.groups())
    return finetune(material.tunable, task, e.finetune, resamples=e.bootstrap, seed=e.seed)


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
    "segment": _segment,
    "finetune": _finetune,
    "health": _health,
}
