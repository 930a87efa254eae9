"""PCA pictures of patch features: the same few test images of every checkpoint, to be looked at by a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sonoforge_trainer.evaluate.tiles import sheet, tile

GALLERY = 8
"""Images of the gallery: the first of the test split, in the order of the manifest."""

TILE = 128
"""Side of a picture's tile in pixels."""

_PERCENTILES = (1, 99)


def principal_colours(patches_npd: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The first three principal components of the patches of all images as red, green and blue [n, N, 3].

    Each component runs from its 1st to its 99th percentile; its sign is that of its largest loading, so that the same
    features always have the same colours.
    """
    n, patches, width = patches_npd.shape
    rows = patches_npd.reshape(-1, width).astype(np.float64)
    rows = rows - rows.mean(0)
    _, _, axes = np.linalg.svd(rows, full_matrices=False)
    axes = axes[:3]
    axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None]
    components = np.zeros((len(rows), 3))
    components[:, : len(axes)] = rows @ axes.T
    low, high = np.percentile(components, _PERCENTILES, axis=0)
    scaled = (components - low) / np.where(high > low, high - low, 1.0)
    colours: npt.NDArray[np.uint8] = (np.clip(scaled, 0, 1) * 255).round().astype(np.uint8)
    return colours.reshape(n, patches, 3)


def gallery_sheet(images_u8: Sequence[Tensor], patches_npd: npt.NDArray[Any], grid: tuple[int, int]) -> bytes:
    """A PNG of two rows: the images [C, H, W], and below each its patches in principal colours."""
    colours = [c.reshape(*grid, 3) for c in principal_colours(patches_npd)]
    return sheet([[tile(image, TILE) for image in images_u8], colours], TILE)
