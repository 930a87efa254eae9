"""Best and worst segmentations of the test split: true and predicted masks over their images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from sonoforge_trainer.contract import OverlaySheet, SampleConfusions
from sonoforge_trainer.evaluate.metrics import mean_of_known
from sonoforge_trainer.evaluate.overlap import dice
from sonoforge_trainer.evaluate.tiles import Pixels, sheet, tile

CASES = 3
"""Images of each kind."""

TILE = 128
"""Side of a tile in pixels: a sheet of six columns and two rows is below 600 kB."""

COLOURS = ("#ff9b3d", "#37c6f4", "#8ee04e", "#f26fd0", "#ffe14d", "#a78bfa", "#ff6b6b", "#4de0c2")
"""Colours of the classes but the background, used again from the first where there are more."""

_FILL, _EDGE = 0.35, 0.95


@dataclass(frozen=True)
class Extremes:
    """Numbers of test images among those with a mask, and their foreground Dice: best first, worst first."""

    best: tuple[tuple[int, float], ...]
    worst: tuple[tuple[int, float], ...]

    @property
    def images(self) -> tuple[int, ...]:
        """The numbers, in the order of the columns."""
        return tuple(number for number, _ in (*self.best, *self.worst))


def extremes(samples: SampleConfusions) -> Extremes | None:
    """The best and the worst images by mean foreground Dice; None where no image has a foreground.

    An image is in one of the two only.
    """
    size = len(samples.classes)
    confusion_ikk = np.array(samples.counts, np.int64).reshape(-1, size, size)
    value_i = mean_of_known(dice(confusion_ikk)[:, 1:])
    ranked = [int(i) for i in np.argsort(-value_i, kind="stable") if np.isfinite(value_i[i])]
    if not ranked:
        return None
    best = ranked[: min(CASES, -(-len(ranked) // 2))]
    worst = ranked[len(best) :][::-1][:CASES]
    return Extremes(*(tuple((i, round(float(value_i[i]), 4)) for i in chosen) for chosen in (best, worst)))


def overlay_sheet(
    found: Extremes,
    classes: tuple[str, ...],
    *,
    images: Callable[[int], Tensor],
    truths: Callable[[int], npt.NDArray[Any]],
    predicted: Sequence[npt.NDArray[Any]],
    protocol: str,
    name: str,
) -> tuple[OverlaySheet, bytes]:
    """The document and the PNG, called `name`.

    `images` [C, H, W] uint8 and true masks [H, W] by number of the image, predicted masks in the order of the columns.
    """
    colours = tuple(COLOURS[number % len(COLOURS)] for number in range(len(classes) - 1))
    tiles = [tile(images(number), TILE) for number in found.images]
    rows = [
        [painted(pixels, mask, colours) for pixels, mask in zip(tiles, masks, strict=True)]
        for masks in ([truths(number) for number in found.images], predicted)
    ]
    document = OverlaySheet(
        picture=name,
        protocol=protocol,
        tile=TILE,
        classes=classes,
        colours=colours,
        best=tuple(value for _, value in found.best),
        worst=tuple(value for _, value in found.worst),
    )
    return document, sheet(rows, TILE)


def painted(pixels: Pixels, mask_hw: npt.NDArray[Any], colours: Sequence[str]) -> Pixels:
    """A picture [S, S, 3] under the classes of a mask [H, W]: filled lightly, with a strong edge."""
    side = len(pixels)
    mask = np.asarray(Image.fromarray(mask_hw.astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST))
    padded = np.pad(mask, 1, mode="edge")
    shifted = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    edge = np.any([mask != other for other in shifted], axis=0)
    painted = pixels.astype(np.float64)
    for number, colour in enumerate(colours, start=1):
        paint = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)], np.float64)
        for part, strength in ((mask == number, _FILL), ((mask == number) & edge, _EDGE)):
            painted[part] += strength * (paint - painted[part])
    return painted.round().astype(np.uint8)
