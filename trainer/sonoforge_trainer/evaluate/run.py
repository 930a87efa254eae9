"""One evaluation of one model: idempotent, one feature pass, one result object whoever gets there first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import structlog
import torch

from sonoforge_trainer.contract import ContractError, EvaluationRequest, EvaluationResult, ShardManifest
from sonoforge_trainer.decode import CorruptImageError, decode
from sonoforge_trainer.evaluate.artifacts import leave_artifacts
from sonoforge_trainer.evaluate.dataset import Record, Table, scan, select
from sonoforge_trainer.evaluate.errors import EvaluationDataError
from sonoforge_trainer.evaluate.feature_cache import FeatureCache
from sonoforge_trainer.evaluate.features import FeatureModel, FeaturePass, FeatureSet, resized
from sonoforge_trainer.evaluate.once import write_first
from sonoforge_trainer.evaluate.pictures import GALLERY, gallery_sheet
from sonoforge_trainer.evaluate.protocols import Clock, Material, named_scores, needs_image, run_protocols
from sonoforge_trainer.evaluate.subjects import open_subject
from sonoforge_trainer.evaluate.tuning import Tunable
from sonoforge_trainer.shards.reader import read_manifest
from sonoforge_trainer.storage import ObjectNotFoundError, Storage

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Gathered:
    """What one reading of a set gave."""

    features: FeatureSet
    table: Table
    gallery: tuple[torch.Tensor, ...]
    """The first images of the test split [C, H, W] uint8."""
    gallery_rows: tuple[int, ...]
    """Their rows in the table."""
    images: Mapping[int, torch.Tensor]
    """Images at the model's resolution [C, R, R] uint8 by row, of the samples that were asked for."""


def evaluate(request: EvaluationRequest, storage: Storage, device: torch.device) -> EvaluationResult:
    """Do what is asked, or return what was found before: doing it twice changes nothing.

    Of two processes that do the same at once, both return the result of the one that was first. Raises
    DamagedCheckpointError, StorageError, EvaluationDataError, EvaluationConfigError, WeightsError, ContractError.
    """
    known = existing_result(request, storage)
    if known is not None:
        _log.info("result is there already", evaluation=request.evaluation.name, id=request.id)
        return known
    evaluation = request.evaluation
    clock = Clock()
    subject = open_subject(request, storage, device)
    model = subject.model
    manifest = read_manifest(evaluation.shards, storage)
    cache = FeatureCache(
        storage,
        request.model_uri,
        checkpoint_digest=subject.digest,
        dataset_digest=manifest.dataset_digest,
        resolution=model.resolution,
    )
    with clock.measure("features"):
        kept = cache.load()
        gathered = gather(
            evaluation.shards, model, manifest, storage, kept, lambda record: needs_image(evaluation, record)
        )
        if kept is None:
            cache.keep(gathered.features)
    _log.info(
        "features ready", evaluation=evaluation.name, samples=len(gathered.table.records), passes=int(kept is None)
    )
    selection = select(gathered.table, evaluation)
    tunable = (
        Tunable(subject.backbone, subject.card, model.resolution, gathered.images, device)
        if subject.backbone is not None and subject.card is not None
        else None
    )
    material = Material(
        evaluation, model, gathered.features, selection, device, tunable, teacher_entropy=subject.teacher_entropy
    )
    findings = run_protocols(material, clock, evaluation.protocols)
    pictures = []
    if gathered.gallery:
        patches = gathered.features.patches_of(np.array(gathered.gallery_rows, np.int64))
        pictures.append(f"{evaluation.name}-{request.id}-pca.png")
        folder = request.result_uri.rpartition("/")[0]
        storage.write(f"{folder}/{pictures[0]}", gallery_sheet(gathered.gallery, patches, model.grid))
    with clock.measure("artifacts"):
        artifacts = leave_artifacts(request, material, findings, storage)
    result = EvaluationResult(
        request=request,
        step=subject.step,
        samples=subject.samples,
        dataset_digest=manifest.dataset_digest,
        counts=selection.counts,
        scores=named_scores(findings),
        chosen={protocol: finding.chosen for protocol, finding in findings.items() if finding.chosen},
        details={protocol: finding.details for protocol, finding in findings.items()},
        seconds={name: round(seconds, 3) for name, seconds in clock.seconds.items()},
        feature_passes=int(kept is None),
        pictures=tuple(pictures),
        artifacts=artifacts,
    )
    return put_result(result, storage)


def existing_result(request: EvaluationRequest, storage: Storage) -> EvaluationResult | None:
    """The result of this very request, or None. One that cannot be read is removed, to be made again."""
    try:
        result = EvaluationResult.from_json(storage.read(request.result_uri), where=request.result_uri)
    except ObjectNotFoundError:
        return None
    except ContractError:
        result = None
    if result is None or result.request.id != request.id:
        _log.warning("result is damaged and made again", uri=request.result_uri)
        storage.delete(request.result_uri)
        return None
    return result


def put_result(result: EvaluationResult, storage: Storage) -> EvaluationResult:
    """Write the result unless one is there; returns the one that is there afterwards."""
    request = result.request
    while not write_first(storage, request.model_uri, request.result_uri, result.to_json().encode()):
        first = existing_result(request, storage)
        if first is not None:
            return first
    return result


def gather(
    uri: str,
    model: FeatureModel,
    manifest: ShardManifest,
    storage: Storage,
    kept: FeatureSet | None,
    wanted: Callable[[Record], bool] = lambda record: False,
) -> Gathered:
    """Read the set at `uri` once: its table, its gallery, and its features unless they are known already.

    The images of samples that are `wanted` are kept in memory at the model's resolution.
    """
    feature_pass = FeaturePass(model) if kept is None else None
    gallery: dict[int, torch.Tensor] = {}
    images: dict[int, torch.Tensor] = {}

    def visit(row: int, record: Record, image: bytes) -> None:
        shown = record.split == "test" and len(gallery) < GALLERY
        if feature_pass is None and not shown and not wanted(record):
            return
        pixels = _decoded(image, model.channels, row)
        if shown:
            gallery[row] = pixels
        if wanted(record):
            pixels = images[row] = resized(pixels, model.resolution)
        if feature_pass is not None:
            feature_pass.add(pixels, patches=shown or record.mask is not None)

    table = scan(manifest, uri, storage, visit)
    features = feature_pass.finish() if feature_pass is not None else kept
    assert features is not None
    return Gathered(features, table, tuple(gallery.values()), tuple(gallery), images)


def _decoded(image: bytes, channels: int, row: int) -> torch.Tensor:
    try:
        return torch.from_numpy(decode(image, channels).copy())
    except CorruptImageError as error:
        raise EvaluationDataError(
            f"image {row} of those in train, val and test cannot be decoded ({type(error).__name__}); "
            "verify the evaluation set with `sonoforge shards verify --decode` and build it again"
        ) from None
