"""One sample of a set, not yet read: what its table or its path says, and how its pixels are obtained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sonoforge_trainer.shards.faults import ImageError
from sonoforge_trainer.shards.sources import Location, Row, file_location

Indices = NDArray[np.uint8]


@dataclass(frozen=True)
class MaskPixels:
    """A mask as class indices."""

    indices: Indices
    """[height, width]; 0 is the background."""
    notes: tuple[str, ...] = ()
    """Codes of the importer's checks that this mask trips."""


class MaskSource(Protocol):
    """Where a mask comes from. The `repr` says everything that decides its pixels."""

    def read(self) -> MaskPixels:
        """The mask. Raises ImageError."""
        ...


class ImageSource(Protocol):
    """Where an image comes from. The `repr` says everything that decides its bytes."""

    def read(self) -> bytes:
        """An image file of a kind that `shards.images` reads. Raises ImageError."""
        ...


@dataclass(frozen=True)
class ImageFile:
    """An image that is a file of its own."""

    path: Path
    """The file. It may identify a patient: never shown."""

    def read(self) -> bytes:
        """The bytes of the file. Raises ImageError."""
        return read_file(self.path)


def read_file(path: Path) -> bytes:
    """The bytes of a file. Raises ImageError without its name."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"the file cannot be read ({error.strerror})") from None


@dataclass(frozen=True)
class Record:
    """One sample: the row that the shard builder places, and the sources of its pixels."""

    row: Row
    """Label, split, patient, clip and fields. Identifiers are as the set has them."""
    image: ImageSource
    """The image."""
    mask: MaskSource | None = None
    """The mask, where there is one."""


@dataclass
class RecordList:
    """Records with running numbers; what every importer fills."""

    records: list[Record] = field(default_factory=list)

    def add(
        self,
        reference: str,
        image: ImageSource,
        files: Iterable[Path],
        mask: MaskSource | None = None,
        *,
        label: str = "",
        split: str = "",
        patient: str = "",
        clip: str = "",
        fields: Mapping[str, str] | None = None,
    ) -> None:
        """Add a sample. `reference` is its name inside the set, `files` what its pixels come from."""
        row = Row(
            len(self.records) + 1,
            reference,
            _location(files),
            label=label,
            split=split,
            patient=patient,
            clip=clip,
            fields=tuple((fields or {}).items()),
        )
        self.records.append(Record(row, image, mask))


def _location(files: Iterable[Path]) -> Location:
    """All files of a sample in one location, so that a change of any of them makes its shard anew."""
    locations = [file_location(path) for path in files]
    return Location("\n".join(loc.where for loc in locations), "\n".join(loc.stamp for loc in locations))
