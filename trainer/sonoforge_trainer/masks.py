"""iBOT block masks whose number of masked patches never changes, so that every step has the same shapes.

As in DINOv2, half of the global crops are masked (`MaskConfig.probability`), by rectangles of log-uniform aspect ratio
in 0.3 to 1/0.3 and at least 4 patches. DINOv2 draws each crop's target from one of equal slices of the ratio range;
here the targets are the middles of those slices, and each is met exactly: single patches complete the rectangles.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sonoforge_trainer.contract import MaskConfig
from sonoforge_trainer.draws import permutation, uniforms

Bools = NDArray[np.bool_]

_MIN_BLOCK = 4
_LOG_ASPECT = math.log(1 / 0.3)
_ATTEMPTS = 40


def masked_counts(crops: int, patches: int, config: MaskConfig) -> list[int]:
    """Masked patches of each masked crop, ascending: constant for a run. Crops beyond the list are not masked."""
    masked = int(crops * config.probability)
    low, high = config.ratio
    counts = [round(patches * (low + (high - low) * (slot + 0.5) / masked)) for slot in range(masked)]
    return [count for count in counts if count]


def draw_masks(crops: int, grid: int, config: MaskConfig, seed: int, *key: int) -> Bools:
    """Masks [crops, grid * grid] for (seed, key): which crop gets which target, and where its patches are masked."""
    counts = masked_counts(crops, grid * grid, config)
    masks_kn = np.zeros((crops, grid * grid), dtype=bool)
    slots = permutation(crops, seed, "mask slots", *key)[: len(counts)]
    for slot, count in zip(slots.tolist(), counts, strict=True):
        masks_kn[slot] = block_mask(grid, count, seed, *key, slot).reshape(-1)
    return masks_kn


def block_mask(grid: int, count: int, seed: int, *key: int) -> Bools:
    """A mask [grid, grid] with exactly `count` patches for (seed, key)."""
    mask_hw = np.zeros((grid, grid), dtype=bool)
    left = count
    for area_u, aspect_u, top_u, left_u in uniforms(4 * _ATTEMPTS, seed, "mask blocks", *key).reshape(-1, 4).tolist():
        if left < _MIN_BLOCK:
            break
        area = _MIN_BLOCK + (left - _MIN_BLOCK) * area_u
        aspect = math.exp(_LOG_ASPECT * (2 * aspect_u - 1))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height < grid and 0 < width < grid):
            continue
        row, column = int(top_u * (grid - height + 1)), int(left_u * (grid - width + 1))
        block_hw = mask_hw[row : row + height, column : column + width]
        new = height * width - int(np.count_nonzero(block_hw))
        if 0 < new <= left:
            block_hw[...] = True
            left -= new
    if left:
        free = np.flatnonzero(~mask_hw)
        mask_hw.reshape(-1)[free[permutation(len(free), seed, "mask rest", *key)[:left]]] = True
    return mask_hw
