"""Nearest training images of a few fixed test images: what the features of a checkpoint take to be alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sonoforge_trainer.contract import Neighbour, NeighbourRow, NeighbourSheet
from sonoforge_trainer.evaluate.dataset import Selection
from sonoforge_trainer.evaluate.features import FeatureSet
from sonoforge_trainer.evaluate.knn import normalised
from sonoforge_trainer.evaluate.tiles import sheet, tile

QUERIES, NEIGHBOURS = 6, 5
"""Test images of a sheet, the first of the selection so that every checkpoint has the same, and neighbours of each."""

TILE = 80
"""Side of a tile in pixels: a sheet is below 500 kB."""


@dataclass(frozen=True)
class Nearest:
    """Rows of the table: queries, and for each its neighbours, nearest first, with their cosine similarities."""

    queries: tuple[int, ...]
    neighbours: tuple[tuple[int, ...], ...]
    similarities: tuple[tuple[float, ...], ...]

    @property
    def rows(self) -> set[int]:
        """Every row whose image the sheet shows."""
        return {*self.queries, *(row for rows in self.neighbours for row in rows)}


def nearest(selection: Selection, features: FeatureSet, parts: tuple[str, ...], device: torch.device) -> Nearest | None:
    """The neighbours in the training split of the first test images; None where one of the splits is empty."""
    train, test = selection.rows["train"], selection.rows["test"][:QUERIES]
    if not len(train) or not len(test):
        return None
    bank, queries = (normalised(features.joined(parts, rows), device) for rows in (train, test))
    similarity, index = (queries @ bank.T).topk(min(NEIGHBOURS, len(train)), dim=1)
    return Nearest(
        tuple(test.tolist()),
        tuple(tuple(train[row].tolist()) for row in index.cpu().numpy()),
        tuple(tuple(row) for row in similarity.cpu().tolist()),
    )


def neighbour_sheet(
    found: Nearest, labels: Sequence[str], images: Callable[[int], Tensor], name: str
) -> tuple[NeighbourSheet, bytes]:
    """The document and the PNG, called `name`; labels and images [C, H, W] uint8 by row of the table."""
    rows: Sequence[Sequence[int]] = [(q, *near) for q, near in zip(found.queries, found.neighbours, strict=True)]
    documents = tuple(
        NeighbourRow(
            label=labels[query],
            neighbours=tuple(
                Neighbour(label=labels[row], similarity=round(value, 4))
                for row, value in zip(near, values, strict=True)
            ),
        )
        for query, near, values in zip(found.queries, found.neighbours, found.similarities, strict=True)
    )
    data = sheet([[tile(images(row), TILE) for row in line] for line in rows], TILE)
    return NeighbourSheet(picture=name, tile=TILE, rows=documents), data
