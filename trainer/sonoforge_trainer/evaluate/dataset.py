"""An evaluation set: its table of samples without images, and the part of it that an evaluation uses.

Splits that leak are refused: a patient, a clip or the same bytes of an image in two of train, val and test makes every
number on the test split a lie. Messages hold counts only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sonoforge_trainer.contract import Evaluation, ShardManifest
from sonoforge_trainer.evaluate.errors import EvaluationConfigError, EvaluationDataError
from sonoforge_trainer.evaluate.metrics import Ints
from sonoforge_trainer.evaluate.problem import SPLITS
from sonoforge_trainer.shards.faults import DataSetError
from sonoforge_trainer.shards.reader import Sample, base_of, iterate
from sonoforge_trainer.storage import Storage


@dataclass(frozen=True)
class Record:
    """One sample without its image."""

    split: str
    fields: dict[str, str]
    patient: str
    """Keyed hash; empty where not known."""
    clip: int
    image_digest: bytes
    """SHA-256 of the image file."""
    mask: bytes | None
    """Index PNG."""
    position: int = 0
    """Number of the sample in the manifest."""

    @property
    def group(self) -> str:
        """What is drawn together: the patient, or the clip where the patient is not known."""
        return f"patient {self.patient}" if self.patient else f"clip {self.clip}"


@dataclass(frozen=True)
class Table:
    """Every sample of a set that is in a split, in the order of the manifest."""

    manifest: ShardManifest
    records: tuple[Record, ...]


def scan(manifest: ShardManifest, uri: str, storage: Storage, visit: Callable[[int, Record, bytes], None]) -> Table:
    """Read the set once; `visit` gets every row, its record and its image file. Shards are checked by digest.

    Samples outside train, val and test (unlabelled ones) are passed over. Raises StorageError, and EvaluationDataError
    where nothing is in a split.
    """
    patients = [patient for shard in manifest.shards for patient in shard.patients]
    clips = [clip for shard in manifest.shards for clip in shard.clips]
    records: list[Record] = []
    samples = zip(_samples(manifest, uri, storage), patients, clips, strict=True)
    for position, (sample, patient, clip) in enumerate(samples):
        split = str(sample.fields.get("split", ""))
        if split not in SPLITS:
            continue
        digest = hashlib.sha256(sample.image).digest()
        record = Record(split, _texts(sample), patient, clip, digest, sample.mask, position)
        visit(len(records), record, sample.image)
        records.append(record)
    if not records:
        raise EvaluationDataError(
            f"{uri}: no sample is in {', '.join(SPLITS)}; build the evaluation set with --split-column or --splits"
        )
    return Table(manifest, tuple(records))


def _samples(manifest: ShardManifest, uri: str, storage: Storage) -> Iterator[Sample]:
    try:
        yield from iterate(manifest, base_of(uri), storage)
    except DataSetError as error:
        raise EvaluationDataError(str(error)) from None


def _texts(sample: Sample) -> dict[str, str]:
    # A class is its text everywhere, so that 1 and "1" are the same class and no repository's numbering matters.
    return {name: value if isinstance(value, str) else str(value) for name, value in sample.fields.items()}


@dataclass(frozen=True)
class Selection:
    """Rows of a table by split. `rows` are in the order of the manifest."""

    table: Table
    rows: dict[str, Ints]

    @property
    def counts(self) -> dict[str, int]:
        """Samples by split."""
        return {split: len(rows) for split, rows in self.rows.items()}

    def records(self, split: str) -> list[Record]:
        """Records of one split."""
        return [self.table.records[row] for row in self.rows[split]]

    def where(self, wanted: Callable[[Record], bool]) -> Selection:
        """The part that passes a filter."""
        records = self.table.records
        kept = {s: np.array([r for r in rows if wanted(records[r])], np.int64) for s, rows in self.rows.items()}
        return Selection(self.table, kept)

    def require_splits(self, splits: Iterable[str], what: str) -> None:
        """Raises EvaluationDataError where one of the splits has no sample."""
        missing = [split for split in splits if not len(self.rows[split])]
        if missing:
            raise EvaluationDataError(
                f"{what} needs train, val and test, but there is no usable sample in {' and '.join(missing)}; "
                "build the set with all three splits (--validation draws val from train), or correct `where`"
            )

    def labels(self, field: str) -> tuple[tuple[str, ...], dict[str, Ints]]:
        """Classes, sorted by text, and the class of each row by split."""
        texts = {split: [record.fields.get(field, "") for record in self.records(split)] for split in self.rows}
        classes = tuple(sorted({text for values in texts.values() for text in values}))
        numbers = {name: number for number, name in enumerate(classes)}
        return classes, {s: np.array([numbers[text] for text in values], np.int64) for s, values in texts.items()}

    def groups(self) -> dict[str, Ints]:
        """A number for each row's patient (or clip), by split."""
        found = {}
        for split in self.rows:
            names = [record.group for record in self.records(split)]
            found[split] = np.unique(np.array(names, dtype=object).astype(str), return_inverse=True)[1].astype(np.int64)
        return found


def passes(record: Record, evaluation: Evaluation) -> bool:
    """Whether a sample has the values of the evaluation's `where`."""
    return all(record.fields.get(name, "") == value for name, value in evaluation.where.items())


def select(table: Table, evaluation: Evaluation) -> Selection:
    """The samples that pass the evaluation's `where`, leaks refused.

    Raises EvaluationConfigError for a field that no sample has, EvaluationDataError for a leak or an empty selection.
    """
    for name in evaluation.where:
        if not any(name in record.fields for record in table.records):
            known = ", ".join(sorted({name for record in table.records for name in record.fields}))
            raise EvaluationConfigError(
                f"evaluation {evaluation.name}: where.{name}: no sample has it; fields: {known}"
            )
    chosen = [(row, record) for row, record in enumerate(table.records) if passes(record, evaluation)]
    if not chosen:
        raise EvaluationDataError(f"evaluation {evaluation.name}: no sample passes `where`; correct its values")
    rows = {s: np.array([row for row, record in chosen if record.split == s], np.int64) for s in SPLITS}
    refuse_leaks([record for _, record in chosen])
    return Selection(table, rows)


def refuse_leaks(records: Sequence[Record]) -> None:
    """Raises EvaluationDataError where splits share patients, clips or image files; the message counts them."""
    identities: dict[str, Callable[[Record], str]] = {
        "patient": lambda record: record.patient,
        "clip": lambda record: str(record.clip),
        "image file": lambda record: record.image_digest.hex(),
    }
    for what, identity in identities.items():
        splits: dict[object, set[str]] = {}
        for record in records:
            if identity(record):
                splits.setdefault(identity(record), set()).add(record.split)
        shared = [found for found in splits.values() if len(found) > 1]
        if shared:
            pairs = [f"{sum({a, b} <= s for s in shared)} in {a} and {b}" for a, b in _PAIRS]
            raise EvaluationDataError(
                f"{len(shared)} {what}{'s are' if len(shared) > 1 else ' is'} in more than one split "
                f"({', '.join(pairs)}); scores on such a test split mean nothing: build the set with splits by patient "
                "and without duplicates"
            )


_PAIRS = (("train", "val"), ("train", "test"), ("val", "test"))
