"""The data card of the page: what each evaluation set is, as far as anybody wrote it down."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import structlog

from sonoforge_trainer.contract import ContractError, EvaluationResult, ShardManifest
from sonoforge_trainer.datasets.card import CARD, DataCard, SplitCard
from sonoforge_trainer.storage import ObjectNotFoundError, Storage, StorageError

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
    manifest, card = _manifest(result, storage), _card(result, storage)
    counted = card.splits if card else {}
    findings = card.findings if card else ()
    return DataSet(
        evaluation=evaluation.name,
        name=card.title if card else manifest.name if manifest else "",
        synthetic=bool(manifest and manifest.synthetic),
        licence=card.licence if card else manifest.licence if manifest else "",
        citation=card.citation if card else manifest.citation if manifest else "",
        splits={split: _split(images, counted.get(split)) for split, images in result.counts.items()},
        selection=evaluation.where,
        source=card.source if card else "",
        split_rule=card.split_rule if card else "",
        findings=tuple((f.state, f.count, f.text) for f in findings if f.count),
        looked_for=len(findings) if card else None,
    )


def _split(images: int, card: SplitCard | None) -> SplitCounts:
    if card is None or card.samples != images:
        return SplitCounts(images)  # the evaluation used another part of the set than the card counts
    return SplitCounts(images, card.patients or None, card.labels)


def _manifest(result: EvaluationResult, storage: Storage) -> ShardManifest | None:
    uri = result.request.evaluation.shards
    try:
        manifest = ShardManifest.from_json(storage.read(uri), where="shards.json", show_values=False)
    except (StorageError, ContractError) as error:
        log.warning("report.data_set_missing", evaluation=result.request.evaluation.name, reason=type(error).__name__)
        return None
    return manifest if manifest.dataset_digest == result.dataset_digest else None


def _card(result: EvaluationResult, storage: Storage) -> DataCard | None:
    """The card beside the shards, where there is one of the very set that was evaluated."""
    uri = f"{result.request.evaluation.shards.rpartition('/')[0]}/{CARD}"
    try:
        card = DataCard.from_json(storage.read(uri), where=CARD, show_values=False)
    except ObjectNotFoundError:
        return None
    except (StorageError, ContractError) as error:
        log.warning("report.card_unreadable", evaluation=result.request.evaluation.name, reason=type(error).__name__)
        return None
    return card if card.dataset_digest == result.dataset_digest else None
