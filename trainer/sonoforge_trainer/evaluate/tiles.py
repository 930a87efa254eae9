"""Sheets of small pictures as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from sonoforge_trainer.evaluate.features import resized

Pixels = npt.NDArray[np.uint8]
"""[H, W, 3]."""

GAP = 4
"""Pixels between two tiles."""


def tile(image_u8: Tensor, side: int) -> Pixels:
    """A square RGB picture of an image [C, H, W] uint8."""
    pixels: Pixels = resized(image_u8, side).expand(3, -1, -1).permute(1, 2, 0).numpy()
    return pixels


def sheet(rows: Sequence[Sequence[npt.NDArray[Any]]], side: int) -> bytes:
    """A PNG of rows of tiles [h, w, 3] uint8; smaller ones are enlarged without smoothing."""
    pitch = side + GAP
    columns = max(len(row) for row in rows)
    picture = Image.new("RGB", (columns * pitch - GAP, len(rows) * pitch - GAP), (255, 255, 255))
    for number, row in enumerate(rows):
        for column, pixels in enumerate(row):
            one = Image.fromarray(np.ascontiguousarray(pixels)).resize((side, side), Image.Resampling.NEAREST)
            picture.paste(one, (column * pitch, number * pitch))
    data = io.BytesIO()
    picture.save(data, "PNG", optimize=True)
    return data.getvalue()
