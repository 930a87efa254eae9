"""Multi-crop geometry on uint8: random resized crops and flips, the same pixels as torch's antialiased bicubic.

Torch resizes a one-channel image several times slower than its SIMD kernel could: the kernel works on four interleaved
channels, and a gray image is spread to four of which three are thrown away. Here four neighbouring pixels of a row are
the four channels. That is exact for a resize along columns, where no pixel depends on its neighbours in the row; the
resize along rows does the same on the transposed image. The image is transposed once, each crop once.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sonoforge_trainer.contract import AugmentConfig, CropsConfig

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    """First row."""
    left: int
    """First column."""
    height: int
    """Rows."""
    width: int
    """Columns."""


_ATTEMPTS = 10
_LOG_RATIO = math.log(4 / 3)
UNIFORMS = 2 * _ATTEMPTS + 4
"""Random numbers that the geometry of one crop takes: area and aspect of each attempt, position, flips."""


def draw_boxes(uniforms_kd: Floats, height: int, width: int, scales_k2: Floats) -> list[Box]:
    """A box for each row of uniform numbers [k, at least 22], as torchvision's RandomResizedCrop draws it.

    The area is uniform between the two parts of the image in `scales_k2`, the aspect ratio log-uniform in 3/4 to 4/3.
    The first of ten attempts that fits is taken; where none does, the largest centred box with an allowed aspect ratio.
    """
    attempts_ka2 = uniforms_kd[:, : 2 * _ATTEMPTS].reshape(-1, _ATTEMPTS, 2)
    low_k1, high_k1 = scales_k2[:, :1], scales_k2[:, 1:]
    areas_ka = height * width * (low_k1 + (high_k1 - low_k1) * attempts_ka2[..., 0])
    ratios_ka = np.exp(_LOG_RATIO * (2 * attempts_ka2[..., 1] - 1))
    widths_ka = np.rint(np.sqrt(areas_ka * ratios_ka))
    heights_ka = np.rint(np.sqrt(areas_ka / ratios_ka))
    fits_ka = (widths_ka > 0) & (widths_ka <= width) & (heights_ka > 0) & (heights_ka <= height)
    boxes: list[Box] = []
    places_k2 = uniforms_kd[:, 2 * _ATTEMPTS : 2 * _ATTEMPTS + 2].tolist()
    for crop, (attempt, (down, right)) in enumerate(zip(fits_ka.argmax(axis=1).tolist(), places_k2, strict=True)):
        if fits_ka[crop, attempt]:
            box_height, box_width = int(heights_ka[crop, attempt]), int(widths_ka[crop, attempt])
            top, left = int(down * (height - box_height + 1)), int(right * (width - box_width + 1))
            boxes.append(Box(top, left, box_height, box_width))
        else:
            boxes.append(_centred_box(height, width))
    return boxes


def _centred_box(height: int, width: int) -> Box:
    box_height = min(height, max(1, round(width * 4 / 3)))
    box_width = min(width, max(1, round(height * 4 / 3)))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


class Source:
    """An image [C, H, W], made ready for several crops."""

    def __init__(self, image_chw: Pixels) -> None:
        channels, height, width = image_chw.shape
        # Rows are read in fours; what the padding holds is never looked at.
        self._image_cwh = np.empty((channels, width, _up_to_four(height)), dtype=np.uint8)
        self._image_cwh[:, :, :height] = image_chw.transpose(0, 2, 1)

    def crop(self, box: Box, size: int) -> Pixels:
        """A box of the image, resized to [C, size, size]."""
        top, left, height, width = box
        first, last = top // 4 * 4, _up_to_four(top + height)
        columns_csh = _resize_columns(self._image_cwh[:, left : left + width, first:last], size)
        rows_chs = np.empty((len(columns_csh), height, _up_to_four(size)), dtype=np.uint8)
        rows_chs[:, :, :size] = columns_csh[:, :, top - first : top - first + height].transpose(0, 2, 1)
        return _resize_columns(rows_chs, size)[:, :, :size]


def _up_to_four(length: int) -> int:
    return -(-length // 4) * 4


def _resize_columns(pixels_chw: Pixels, size: int) -> Pixels:
    """[C, H, W] to [C, size, W], for a width that is a multiple of 4."""
    channels, height, width = pixels_chw.shape
    # Torch would make this copy pixel by pixel.
    fours = np.ascontiguousarray(pixels_chw).reshape(channels, height, width // 4, 4)
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(fours).permute(0, 3, 1, 2), (size, width // 4), mode="bicubic", antialias=True
    )
    return resized.permute(0, 2, 3, 1).numpy().reshape(channels, size, width)


class MultiCrop:
    """The two global and several local crops of an image."""

    def __init__(self, crops: CropsConfig, augment: AugmentConfig) -> None:
        self._augment = augment
        self._scales_k2 = np.array([crops.global_scale] * 2 + [crops.local_scale] * crops.local_count)

    def __call__(self, image_chw: Pixels, uniforms_kd: Floats, globals_vchw: Pixels, locals_lchw: Pixels) -> None:
        """Fill the global views [2, C, G, G] and local crops [L, C, S, S] from uniform numbers [2 + L, UNIFORMS]."""
        source = Source(image_chw)
        _, height, width = image_chw.shape
        boxes = draw_boxes(uniforms_kd, height, width, self._scales_k2)
        across_k = np.where(uniforms_kd[:, UNIFORMS - 2] < self._augment.horizontal_flip, -1, 1).tolist()
        down_k = np.where(uniforms_kd[:, UNIFORMS - 1] < self._augment.vertical_flip, -1, 1).tolist()
        for out_chw, box, across, down in zip(chain(globals_vchw, locals_lchw), boxes, across_k, down_k, strict=True):
            out_chw[...] = source.crop(box, out_chw.shape[-1])[:, ::down, ::across]
