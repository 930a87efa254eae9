"""The data card of the page: what each evaluation set is, as far as anybody wrote it down."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from sonoforge_trainer.contract import ContractError, EvaluationResult, ShardManifest
from sonoforge_trainer.storage import ObjectNotFoundError, Storage, StorageError

CARD = "card.json"
"""Name of the card that `sonoforge datasets import` writes beside the shards."""
_CARD_FORMAT = "sonoforge.datacard/"

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class SplitCounts:
    """One split in numbers; None where nobody counted."""

    images: int
    patients: int | None = None
    labels: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSet:
    """One evaluation set."""

    evaluation: str
    name: str
    synthetic: bool
    licence: str
    citation: str
    splits: Mapping[str, SplitCounts]
    """By split; what the evaluation used, and where there is a card what the card says of it."""
    selection: Mapping[str, str]
    """`where` of the evaluation."""
    source: str = ""
    split_rule: str = ""
    findings: tuple[tuple[str, int, str], ...] = ()
    """(state, count, text) of everything an import looked for and found."""
    looked_for: int | None = None
    """Checks of the import; None where the set has no card."""


def data_sets(results: Iterable[EvaluationResult], storage: Storage) -> list[DataSet]:
    """One entry for each evaluation. A set that is gone is described by its results alone."""
    newest = {result.request.evaluation.name: result for result in results}
    return [_data_set(result, storage) for _, result in sorted(newest.items())]


def _data_set(result: EvaluationResult, storage: Storage) -> DataSet:
    evaluation = result.request.evaluation
    manifest = _manifest(result, storage)
    card = _card(result, storage)
    known = card.get("splits") if isinstance(card.get("splits"), dict) else {}
    assert isinstance(known, dict)
    splits = {split: _split(images, known.get(split)) for split, images in result.counts.items()}
    told = card.get("findings")
    found = [f for f in told if isinstance(f, dict)] if isinstance(told, list) else []
    return DataSet(
        evaluation=evaluation.name,
        name=_text(card, "title") or (manifest.name if manifest else ""),
        synthetic=bool(manifest and manifest.synthetic),
        licence=_text(card, "licence") or (manifest.licence if manifest else ""),
        citation=_text(card, "citation") or (manifest.citation if manifest else ""),
        splits=splits,
        selection=evaluation.where,
        source=_text(card, "source"),
        split_rule=_text(card, "splitRule"),
        findings=tuple((_text(f, "state"), _count(f, "count") or 0, _text(f, "text")) for f in found if f.get("count")),
        looked_for=len(found) if card else None,
    )


def _split(images: int, card: object) -> SplitCounts:
    if not isinstance(card, dict) or _count(card, "samples") != images:
        return SplitCounts(images)  # the evaluation used another part of the set than the card counts
    labels = card.get("labels")
    counted = {str(k): v for k, v in labels.items() if type(v) is int} if isinstance(labels, dict) else {}
    return SplitCounts(images, _count(card, "patients") or None, counted)


def _manifest(result: EvaluationResult, storage: Storage) -> ShardManifest | None:
    uri = result.request.evaluation.shards
    try:
        manifest = ShardManifest.from_json(storage.read(uri), where="shards.json", show_values=False)
    except (StorageError, ContractError) as error:
        log.warning("report.data_set_missing", evaluation=result.request.evaluation.name, reason=type(error).__name__)
        return None
    return manifest if manifest.dataset_digest == result.dataset_digest else None


def _card(result: EvaluationResult, storage: Storage) -> dict[str, Any]:
    """The card beside the shards, where there is one of the very set that was evaluated; else nothing."""
    uri = f"{result.request.evaluation.shards.rpartition('/')[0]}/{CARD}"
    try:
        card = json.loads(storage.read(uri))
    except ObjectNotFoundError:
        return {}
    except (StorageError, ValueError) as error:
        log.warning("report.card_unreadable", evaluation=result.request.evaluation.name, reason=type(error).__name__)
        return {}
    known = isinstance(card, dict) and str(card.get("format", "")).startswith(_CARD_FORMAT)
    return card if known and card.get("datasetDigest") == result.dataset_digest else {}


def _text(document: Mapping[str, Any], name: str) -> str:
    value = document.get(name)
    return value if isinstance(value, str) else ""


def _count(document: Mapping[str, Any], name: str) -> int | None:
    value = document.get(name)
    return value if type(value) is int else None
