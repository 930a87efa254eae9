"""Sets without a module of their own: a table, two folders, or a folder for each class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sonoforge_trainer.datasets.importer import About, Importer, Source
from sonoforge_trainer.datasets.record import MaskPixels, Record
from sonoforge_trainer.datasets.splits import as_published
from sonoforge_trainer.shards.images import MaskRule, mask_indices
from sonoforge_trainer.shards.sources import SPLITS, Location, Row
from sonoforge_trainer.storage import Storage


@dataclass(frozen=True)
class StoredImage:
    """An image whose bytes are where a row says."""

    location: Location
    storage: Storage

    def read(self) -> bytes:
        """The bytes. Raises ImageError, StorageError."""
        return self.location.read(self.storage)


@dataclass(frozen=True)
class StoredMask:
    """A mask file of class indices, or of values that a rule maps to them."""

    location: Location
    rule: MaskRule
    storage: Storage

    def read(self) -> MaskPixels:
        """The class indices. Raises ImageError, StorageError."""
        return MaskPixels(mask_indices(self.location.read(self.storage), self.rule))


def records_of(rows: Sequence[Row], masks: MaskRule, storage: Storage) -> list[Record]:
    """Rows of a table or a folder as records."""
    records = []
    for row in rows:
        assert row.image is not None
        mask = StoredMask(row.mask, masks, storage) if row.mask is not None else None
        records.append(Record(row, StoredImage(row.image, storage), mask))
    return records


def generic(
    name: str, rows: Callable[[Path], Sequence[Row]], masks: MaskRule, title: str, storage: Storage
) -> Importer:
    """An importer of what the user describes with options. Licence and citation come from the options, too."""
    about = About(name, title, "not named", "", "", masks.classes)

    def read(source: Source) -> list[Record]:
        return records_of(rows(source.root), masks, storage)

    return Importer(about, read, as_published("as the source says"))


def split_folders(rows: Sequence[Row]) -> list[Row]:
    """Rows of a tree whose first folders are splits (train, val, test): the split, and the label one folder below.

    A tree whose first folders are classes comes back as it is.
    """
    first = {row.reference.partition("/")[0] for row in rows}
    if not first <= set(SPLITS):
        return list(rows)
    return [replace(row, split=row.reference.split("/")[0], label=row.reference.split("/")[1]) for row in rows]
