"""Whom an evaluation measures: the teacher of a checkpoint, or a baseline that is kept with its run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from sonoforge_trainer.card import backbone_from_card
from sonoforge_trainer.checkpoint import CheckpointStore
from sonoforge_trainer.contract import Baseline, EvaluationRequest, ModelCard
from sonoforge_trainer.evaluate.features import BackboneModel, FeatureModel, PixelModel
from sonoforge_trainer.evaluate.hog import HogLbpModel, HogModel
from sonoforge_trainer.evaluate.tuning import supervised_start
from sonoforge_trainer.model import Backbone, initialise
from sonoforge_trainer.storage import Storage
from sonoforge_trainer.weights.loading import load_weights


@dataclass(frozen=True)
class Subject:
    """A model to measure."""

    model: FeatureModel
    """What turns images into features."""
    digest: str
    """What it is: equal digests, equal features."""
    backbone: Backbone | None = None
    """The backbone that protocols which train start from. None for floors."""
    card: ModelCard | None = None
    """What the backbone expects. None for floors."""
    step: int = 0
    """Optimiser steps of the checkpoint; 0 for a baseline."""
    samples: int = 0
    """Images seen in a run of Sonoforge."""
    teacher_entropy: float | None = None
    """What training logged last before the checkpoint, in nats."""


def open_subject(request: EvaluationRequest, storage: Storage, device: torch.device) -> Subject:
    """Load the model that a request is about.

    Raises DamagedCheckpointError, StorageError, WeightsError, EvaluationConfigError.
    """
    baseline = request.baseline
    if baseline is None:
        return _checkpoint(request, storage, device)
    if baseline.kind in _FLOORS:
        return Subject(_FLOORS[baseline.kind](), baseline.id)
    card, backbone, digest = _weights(baseline, storage) if baseline.kind == "weights" else _random(request, storage)
    model = BackboneModel(backbone, card, request.evaluation.resolution, device)
    trained = backbone
    if baseline.kind == "random":
        trained = supervised_start(backbone, baseline.seed).to(device).eval()
    return Subject(model, digest, trained, card, samples=card.samples)


_FLOORS: Mapping[str, Callable[[], FeatureModel]] = {
    "raw-pixels": PixelModel,
    "hog": HogModel,
    "hog-lbp": HogLbpModel,
}


def _checkpoint(request: EvaluationRequest, storage: Storage, device: torch.device) -> Subject:
    store = CheckpointStore(storage, request.checkpoint_uri)
    teacher = store.load_teacher(request.checkpoint_uri, request.checkpoint_digest)
    backbone = backbone_from_card(teacher.card, teacher.tensors)
    records = store.metric_records(request.checkpoint_uri, teacher.manifest)
    return Subject(
        BackboneModel(backbone, teacher.card, request.evaluation.resolution, device),
        request.checkpoint_digest,
        backbone,
        teacher.card,
        teacher.manifest.step,
        teacher.manifest.samples,
        records[-1].get("teacher_entropy") if records else None,
    )


def _weights(baseline: Baseline, storage: Storage) -> tuple[ModelCard, Backbone, str]:
    assert baseline.uri is not None, "the contract checks"
    weights = load_weights(baseline.uri, storage, sha256=baseline.sha256, mean=baseline.mean, std=baseline.std)
    fitted = weights.fitted(resolution=baseline.resolution)
    return fitted.card, fitted.backbone, f"{baseline.id} {weights.sha256}"


def _random(request: EvaluationRequest, storage: Storage) -> tuple[ModelCard, Backbone, str]:
    """The checkpoint's own architecture and input, with weights that only a seed decides."""
    assert request.baseline is not None
    teacher = CheckpointStore(storage, request.checkpoint_uri).load_teacher(
        request.checkpoint_uri, request.checkpoint_digest
    )
    card = teacher.card.model_copy(update={"samples": 0, "data_digest": None, "config_digest": None, "source": None})
    backbone = backbone_from_card(card, teacher.tensors)
    initialise(backbone, request.baseline.seed)
    return card, backbone, f"{request.baseline.id} {card.digest()}"
