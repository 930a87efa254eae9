"""Pictures of the page: patch features, nearest neighbours, overlays. They are images of the data set itself."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import structlog

from sonoforge_trainer.contract import ContractError, Gallery, NeighbourSheet, OverlaySheet
from sonoforge_trainer.report.runs import Evaluated, Run
from sonoforge_trainer.storage import Storage, StorageError

MAX_BYTES = 24 * 2**20
"""Bytes of all pictures of one page. What does not fit is left out, and the page says so."""

_PNG = b"\x89PNG\r\n\x1a\n"

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Picture:
    """One picture, embedded."""

    checkpoint: str
    """Id of the checkpoint it belongs to."""
    step: int
    """Steps of that checkpoint."""
    run: str
    """Name of the run."""
    name: str
    """Name of the evaluation."""
    data_url: str
    """The picture itself, as a data: URL."""


@dataclass(frozen=True)
class Pictures:
    """Everything that is shown."""

    patches: list[Picture] = field(default_factory=list)
    """PCA of the patch features."""
    neighbours: list[tuple[Picture, NeighbourSheet]] = field(default_factory=list)
    """Nearest neighbours."""
    overlays: list[tuple[Picture, OverlaySheet]] = field(default_factory=list)
    """Best and worst segmentations."""
    left_out: int = 0
    """Pictures that did not fit into MAX_BYTES."""


def pictures_of(runs: Sequence[Run], storage: Storage) -> Pictures:
    """The pictures of the first, the best and the last checkpoint of each run, within MAX_BYTES."""
    found = _Reader(storage)
    patches, neighbours, overlays = [], [], []
    for run, one in _shown(runs):
        patches += [found.picture(run, one, name) for name in one.result.pictures]
        gallery = found.gallery(one)
        if gallery.neighbours is not None:
            neighbours.append((found.picture(run, one, gallery.neighbours.picture), gallery.neighbours))
        overlays += [(found.picture(run, one, sheet.picture), sheet) for sheet in gallery.overlays]
    return Pictures(
        sorted((p for p in patches if p), key=_place),
        [(p, s) for p, s in sorted(neighbours, key=lambda pair: _place(pair[0])) if p],
        [(p, s) for p, s in sorted(overlays, key=lambda pair: _place(pair[0])) if p],
        found.left_out,
    )


def _shown(runs: Sequence[Run]) -> Iterator[tuple[Run, Evaluated]]:
    for run in runs:
        scored = [c for c in run.summary.checkpoints if c.results]
        wanted = {c.ref.id for c in [*scored[:1], *scored[-1:], *(c for c in scored if c.best)]}
        for one in run.results:
            if one.checkpoint.ref.id in wanted:
                yield run, one


def _place(picture: Picture | None) -> tuple[str, str, int]:
    return (picture.name, picture.run, picture.step) if picture else ("", "", 0)


class _Reader:
    """Reads pictures until the page is full."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._room = MAX_BYTES
        self.left_out = 0

    def picture(self, run: Run, one: Evaluated, name: str) -> Picture | None:
        ref = one.checkpoint.ref
        try:
            data = self._storage.read(one.beside(name))
        except StorageError as error:
            log.warning("report.picture_missing", checkpoint=ref.id, reason=type(error).__name__)
            return None
        if len(data) > self._room or not data.startswith(_PNG):
            self.left_out += 1
            return None
        self._room -= len(data)
        url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        return Picture(ref.id, ref.step, run.name, one.evaluation, url)

    def gallery(self, one: Evaluated) -> Gallery:
        name = one.result.artifacts.gallery
        if not name:
            return Gallery()
        try:
            return Gallery.from_json(self._storage.read(one.beside(name)), where=name)
        except (StorageError, ContractError) as error:
            log.warning("report.gallery_missing", result=one.result.request.id, reason=type(error).__name__)
            return Gallery()
