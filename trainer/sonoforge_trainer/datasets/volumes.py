"""Pictures that lie in MetaImage files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sonoforge_trainer.datasets.formats.metaimage import read_array
from sonoforge_trainer.datasets.masks import as_png, renamed
from sonoforge_trainer.datasets.record import MaskPixels
from sonoforge_trainer.shards.faults import ImageError

_CHANNELS = 3


@dataclass(frozen=True)
class MhaImage:
    """One picture of one or three channels, which lie one after another or side by side."""

    path: Path

    def read(self) -> bytes:
        """A PNG: gray where the channels are equal. Raises ImageError."""
        return as_png(picture_of(bytes_of(read_array(self.path))))


@dataclass(frozen=True)
class MhaMask:
    """One picture of class indices."""

    path: Path
    classes: int
    """Values are below this."""

    def read(self) -> MaskPixels:
        """The class indices. Raises ImageError."""
        values = bytes_of(read_array(self.path))
        if values.ndim == 3 and values.shape[0] == 1:
            values = values[0]
        if values.ndim != 2:
            raise ImageError("the mask has no two dimensions")
        return MaskPixels(renamed(values, {value: value for value in range(self.classes)}))


def bytes_of(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Values 0 to 255 as bytes, whatever kind of number they were kept as. Raises ImageError for others."""
    small = values.astype(np.uint8)
    if not (small == values).all():
        raise ImageError("has values that are not whole numbers from 0 to 255")
    return small


def picture_of(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[height, width] or [height, width, 3] of an array that may have its channels first. Raises ImageError."""
    if values.ndim == 3 and values.shape[0] in (1, _CHANNELS):
        values = np.moveaxis(values, 0, -1)
    if values.ndim == 3:
        if (values == values[..., :1]).all():
            return np.ascontiguousarray(values[..., 0])
        if values.shape[2] != _CHANNELS:
            raise ImageError(f"has {values.shape[2]} channels; allowed: one or three")
    return np.ascontiguousarray(values)
