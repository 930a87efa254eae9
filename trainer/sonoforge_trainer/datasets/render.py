"""Makes the members of a sample from its record."""

from __future__ import annotations

from collections.abc import Iterable

from sonoforge_trainer.datasets.record import Record
from sonoforge_trainer.shards.build import Rendered
from sonoforge_trainer.shards.faults import ImageError
from sonoforge_trainer.shards.images import ImageRule, encode_mask, picture
from sonoforge_trainer.shards.sources import Row

_VERSION = 1
"""Goes up when an importer makes other bytes of the same files."""


class RecordRenderer:
    """A `Render` for records; rows are known by their numbers."""

    def __init__(self, importer: str, records: Iterable[Record], images: ImageRule, options: str = "") -> None:
        self._records = {record.row.number: record for record in records}
        self._images = images
        self.options = repr((importer, _VERSION, images, options))

    def __call__(self, row: Row) -> Rendered:
        """Read and encode one sample. Raises ImageError."""
        record = self._records[row.number]
        found = picture(record.image.read(), self._images)
        if record.mask is None:
            return Rendered(found.data, found.extension)
        indices = record.mask.read().indices
        if indices.shape != (found.height, found.width):
            raise ImageError(
                f"the mask is {indices.shape[1]} x {indices.shape[0]}, but the image is {found.width} x {found.height}"
            )
        return Rendered(found.data, found.extension, encode_mask(indices))
