"""Makes samples of source files: reads, checks and encodes image and mask."""

from __future__ import annotations

from dataclasses import dataclass

from sonoforge_trainer.shards.build import Rendered
from sonoforge_trainer.shards.images import ImageRule, MaskRule, mask, picture
from sonoforge_trainer.shards.sources import Row
from sonoforge_trainer.storage import Storage


@dataclass(frozen=True)
class FileRenderer:
    """A `Render` for rows with locations."""

    storage: Storage
    """Where objects are read from."""
    images: ImageRule
    """How images become members."""
    masks: MaskRule
    """How masks become members."""

    @property
    def options(self) -> str:
        """What decides the bytes, as text."""
        return repr((self.images, self.masks))

    def __call__(self, row: Row) -> Rendered:
        """Read and encode one sample. Raises ImageError."""
        assert row.image is not None
        found = picture(row.image.read(self.storage), self.images)
        encoded = None
        if row.mask is not None:
            encoded = mask(row.mask.read(self.storage), (found.width, found.height), self.masks)
        return Rendered(found.data, found.extension, encoded)
