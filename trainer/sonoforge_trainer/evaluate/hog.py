"""Hand-made features of shape and texture: HOG (Dalal, Triggs, 2005) and LBP (Ojala, Pietikainen, Maenpaa, 2002)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from sonoforge_trainer.evaluate.features import PIXEL_SIDE, Inputs

_CELL, _ORIENTATIONS = 8, 9
_FROZEN = ("knn", "linear", "logreg", "fewshot")


class HogModel:
    """Histograms of oriented gradients."""

    channels, resolution, grid = 1, PIXEL_SIDE, (PIXEL_SIDE // _CELL,) * 2
    inputs: Inputs = {name: {"hog": ("hog",)} for name in _FROZEN}

    def __call__(self, images_u8: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Normalised blocks of 2 x 2 cells [n, d]; the histogram of each cell as patch features."""
        images = images_u8.float() / 255
        padded = functional.pad(images, (1, 1, 1, 1), mode="replicate")
        dx = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]).squeeze(1)
        dy = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]).squeeze(1)
        # Unsigned orientation in bins; a gradient between two bin centres is shared by both.
        position = torch.atan2(dy, dx).remainder(math.pi) / math.pi * _ORIENTATIONS - 0.5
        lower, share = position.floor(), position - position.floor()
        magnitude = torch.hypot(dx, dy)
        votes = torch.zeros(len(images), _ORIENTATIONS, *magnitude.shape[1:])
        for offset, part in ((0, 1 - share), (1, share)):
            bins = (lower.long() + offset).remainder(_ORIENTATIONS)
            votes.scatter_add_(1, bins.unsqueeze(1), (magnitude * part).unsqueeze(1))
        cells = functional.avg_pool2d(votes, _CELL)
        blocks = functional.unfold(cells, 2).transpose(1, 2)
        return {"hog": functional.normalize(blocks, dim=2).flatten(1)}, cells.flatten(2).transpose(1, 2)


class HogLbpModel:
    """Histograms of oriented gradients beside histograms of uniform local binary patterns."""

    channels, resolution, grid = 1, PIXEL_SIDE, (PIXEL_SIDE // _CELL,) * 2
    inputs: Inputs = {name: {"hog+lbp": ("hog", "lbp")} for name in _FROZEN}

    def __init__(self) -> None:
        self._hog = HogModel()

    def __call__(self, images_u8: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """HOG blocks and LBP histograms of cells of 16 pixels [n, d]; as patch features, both of cells of 8 pixels."""
        pooled, hog_cells = self._hog(images_u8)
        counts = pattern_counts(images_u8, _CELL)
        coarse = functional.avg_pool2d(counts, 2).flatten(2).transpose(1, 2)
        cells = counts.flatten(2).transpose(1, 2)
        return pooled | {"lbp": _hellinger(coarse).flatten(1)}, torch.cat([hog_cells, _hellinger(cells)], dim=2)


def pattern_counts(images_u8: Tensor, cell: int) -> Tensor:
    """Counts of the uniform patterns LBP(8, 1) of images [n, 1, H, W] in each cell, [n, PATTERNS, H / cell, W / cell].

    Bit k of a pixel's pattern says whether its k-th neighbour, around the 3 x 3 square, is at least as bright. Patterns
    with at most two changes around the circle have a bin each; all others share the last. Beyond the border the image
    goes on as at its edge.
    """
    padded = functional.pad(images_u8.float(), (1, 1, 1, 1), mode="replicate")
    height, width = images_u8.shape[-2:]
    code = torch.zeros(images_u8.shape, dtype=torch.int64, device=images_u8.device)
    for bit, (down, right) in enumerate(_CIRCLE):
        neighbour = padded[..., 1 + down : 1 + down + height, 1 + right : 1 + right + width]
        code |= (neighbour >= images_u8).long() << bit
    bins = _BINS.to(code.device)[code]
    one_hot = torch.zeros(len(bins), PATTERNS, height, width, device=bins.device).scatter_(1, bins, 1.0)
    return functional.avg_pool2d(one_hot, cell) * cell**2


_CIRCLE = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))
"""Neighbours of a pixel in the order of the circle, (down, right)."""


def _bins() -> Tensor:
    """The bin of each of the 256 patterns."""
    uniform = [code for code in range(256) if _changes(code) <= 2]
    bins = torch.full((256,), len(uniform))
    bins[torch.tensor(uniform)] = torch.arange(len(uniform))
    return bins


def _changes(code: int) -> int:
    return sum((code >> bit & 1) != (code >> (bit + 1) % 8 & 1) for bit in range(8))


_BINS = _bins()
PATTERNS = int(_BINS.max()) + 1
"""58 uniform patterns, and one bin for the rest."""


def _hellinger(counts_ncp: Tensor) -> Tensor:
    """Unit vectors whose dot product is the Hellinger affinity of two histograms."""
    return functional.normalize(counts_ncp.sqrt(), dim=2)
