"""The evaluation request and result: what a checkpoint is asked, and what it answers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Literal, get_args

from pydantic import Field

from sonoforge_trainer.contract.base import Part, canonical_json
from sonoforge_trainer.contract.baseline import Baseline
from sonoforge_trainer.contract.checkpoint import run_uri
from sonoforge_trainer.contract.evidence import Artifacts
from sonoforge_trainer.contract.shards import Sha256
from sonoforge_trainer.contract.tuning import FinetuneOptions, SegmentOptions

Protocol = Literal["knn", "linear", "logreg", "fewshot", "segment-probe", "segment", "finetune", "health"]
PROTOCOLS: tuple[str, ...] = get_args(Protocol)
"""Every protocol."""
VALIDATION_PREFIX = "val_"
"""Begins the metric that says on the validation split what the metric without it says on the test split."""
_UNLABELLED: tuple[Protocol, ...] = ("health",)
"""Protocols that use neither labels nor splits: there is nothing that choosing by their scores could leak."""
_CLASSIFICATION = ("accuracy", "balanced_accuracy", "f1_macro", "auroc_macro")
_OVERLAPS = tuple(
    f"{overlap}_{over}{how}"
    for overlap in ("dice", "iou")
    for over in ("mean", "foreground")
    for how in ("", "_per_image")
)
PROTOCOL_METRICS: Mapping[Protocol, tuple[str, ...]] = {
    "knn": _CLASSIFICATION,
    "linear": _CLASSIFICATION,
    "logreg": _CLASSIFICATION,
    "fewshot": tuple(f"{probe}_{{shots}}shot_{metric}" for probe in ("knn", "logreg") for metric in _CLASSIFICATION),
    "segment-probe": (*_OVERLAPS, "knn_dice_foreground", "logreg_dice_foreground"),
    "segment": (*_OVERLAPS, *(f"{{shots}}shot_{metric}" for metric in _OVERLAPS)),
    "finetune": _CLASSIFICATION,
    "health": (
        *("rankme", "effective_rank", "feature_deviation", "teacher_entropy"),
        *("same_clip_retrieval", "same_patient_retrieval"),
    ),
}
"""The metrics that a protocol can report; `{shots}` stands for each of the protocol's shots. Data may leave some out: a
set without patients has no same_patient_retrieval."""
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]


class Evaluation(Part):
    """One data set with the protocols to run on it. They share one feature pass."""

    name: Name
    """Name of the evaluation; scores are called NAME-PROTOCOL/METRIC, for example planes-knn/f1_macro."""
    shards: Annotated[str, Field(pattern=r"^(s3|file)://.+\.json$")]
    """URI of the evaluation set's shards.json."""
    protocols: Annotated[tuple[Protocol, ...], Field(min_length=1)]
    """Protocols to run."""
    resolution: Count | None = None
    """Side in pixels of the square input. Not given: the model card's."""
    label: str = "label"
    """Sample field that holds the class, a text."""
    where: dict[str, str] = {}
    """Use only samples whose fields have these values."""
    k: Annotated[tuple[Count, ...], Field(min_length=1)] = (10, 20, 100, 200)
    """knn: numbers of neighbours. The best on validation is the score; all that fit are in the result."""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    """knn: temperature of the votes."""
    shots: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 5, 10)
    """fewshot: patients (or images, where patients are not known) of each class."""
    seeds: Count = 5
    """fewshot, and segment with shots: number of draws."""
    linear_epochs: Count = 10
    """linear: passes over the training features; more on small sets, up to 500 steps."""
    segment: SegmentOptions = SegmentOptions()
    """segment: decoder, backbone and training."""
    finetune: FinetuneOptions = FinetuneOptions()
    """finetune: where it starts, and training."""
    bootstrap: Annotated[int, Field(ge=0)] = 1000
    """Resamples of the patients for confidence intervals; 0 for none."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of every draw."""

    def metrics(self, protocol: Protocol) -> tuple[str, ...]:
        """Names of the metrics that one of the protocols can report on this data set, in the order of reports."""
        shots = self.segment.shots if protocol == "segment" else self.shots
        names: list[str] = []
        for name in PROTOCOL_METRICS[protocol]:
            names += [name.replace("{shots}", str(n)) for n in shots] if "{shots}" in name else [name]
        return tuple(dict.fromkeys(names))


class EvaluationRequest(Part):
    """One (checkpoint, evaluation) to do. Its digest names the job that does it and the result."""

    checkpoint_uri: str
    """Prefix of the checkpoint."""
    checkpoint_digest: Sha256
    """Digest of the checkpoint's manifest."""
    evaluation: Evaluation
    """What to do."""
    baseline: Annotated[Baseline | None, Field(exclude_if=lambda baseline: baseline is None)] = None
    """The model to measure instead of the checkpoint; it is kept with the checkpoint's run, for all its checkpoints."""

    @property
    def id(self) -> str:
        """First 16 hex digits of the digest: same model and same evaluation, same id."""
        if self.baseline is None:
            return self.digest().removeprefix("sha256:")[:16]
        return baseline_request_id(self.baseline, self.evaluation)

    @property
    def model_uri(self) -> str:
        """Prefix of the model that is measured: its features and results are kept below."""
        if self.baseline is None:
            return self.checkpoint_uri
        return f"{run_uri(self.checkpoint_uri)}/baselines/{self.baseline.id}"

    @property
    def result_uri(self) -> str:
        """Where the complete result is kept."""
        return f"{self.model_uri}/eval/{self.evaluation.name}-{self.id}.json"


def baseline_request_id(baseline: Baseline, evaluation: Evaluation) -> str:
    """`EvaluationRequest.id` of a baseline, which is the same for every checkpoint."""
    return hashlib.sha256(canonical_json([baseline.id, evaluation.document()]).encode()).hexdigest()[:16]


class Score(Part):
    """One number with what is known of its spread."""

    value: float
    """The number: on the test split; on the validation split for a val_ metric; on all images for health."""
    low: float | None = None
    """Lower end of the 95 % interval: 2.5 % quantile of a bootstrap over the patients of the test split. Of a mean over
    draws it is that of the mean."""
    high: float | None = None
    """Upper end."""
    deviation: float | None = None
    """Standard deviation over seeds (n - 1), where a draw is involved."""


class EvaluationResult(Part):
    """What an evaluation found."""

    format: Literal["sonoforge.evaluation/v1"] = "sonoforge.evaluation/v1"
    """Format of this document."""
    request: EvaluationRequest
    """What was asked."""
    step: int
    """Optimiser steps of the checkpoint."""
    samples: int
    """Images seen by the checkpoint."""
    dataset_digest: Sha256
    """The evaluation set that was used."""
    counts: dict[str, int]
    """Samples by split."""
    scores: dict[str, Score]
    """PROTOCOL/METRIC to score: knn/f1_macro on test, and knn/val_f1_macro is the same on validation."""
    chosen: dict[str, str] = {}
    """What was selected on the validation split, by protocol."""
    details: dict[str, object] = {}
    """Everything else worth keeping: per-class scores, confusion matrices, curves."""
    seconds: dict[str, float] = {}
    """Time of the feature pass and of each protocol."""
    feature_passes: int = 0
    """Passes over the images: 1, or 0 where cached features were used."""
    pictures: tuple[str, ...] = ()
    """Names of picture objects beside the result."""
    artifacts: Artifacts = Artifacts()
    """Names of documents beside the result."""


def validation_score(name: str) -> str:
    """The validation counterpart of a score: planes-knn/val_f1_macro of planes-knn/f1_macro."""
    model, _, metric = name.partition("/")
    return f"{model}/{VALIDATION_PREFIX}{metric}"


def is_validation_score(name: str) -> bool:
    """Whether a score was measured on the validation split."""
    return name.partition("/")[2].startswith(VALIDATION_PREFIX)


def selection_score(name: str) -> str:
    """The score that checkpoints are compared by where `name` is to be best, so that no test split ever chooses.

    The validation counterpart; a score of a protocol without labels stands for itself. With or without the name of the
    evaluation before the protocol.
    """
    model = name.partition("/")[0]
    if any(model == protocol or model.endswith(f"-{protocol}") for protocol in _UNLABELLED):
        return name
    return validation_score(name)


def split_score(name: str) -> tuple[str, str, str]:
    """The evaluation, protocol and metric of a score: planes-segment-probe/dice is (planes, segment-probe, dice).

    Raises ValueError for a name that is not of this form.
    """
    model, _, metric = name.partition("/")
    for protocol in PROTOCOLS:
        evaluation = model.removesuffix(f"-{protocol}")
        if metric and evaluation != model:
            return evaluation, protocol, metric
    raise ValueError(f"{name!r} is not a score. Allowed: EVALUATION-PROTOCOL/METRIC, PROTOCOL one of {PROTOCOLS}")
