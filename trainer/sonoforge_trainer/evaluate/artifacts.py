"""What an evaluation leaves beside its result for people to look at, written before the result under fixed names.

eval/NAME-ID.json             the result
eval/NAME-ID/evidence.json    outcomes of single test samples
             gallery.json     what the pictures show
             neighbours.png   nearest training images of fixed test images
             PROTOCOL.png     best and worst segmentations
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from sonoforge_trainer.contract import Artifacts, EvaluationRequest, Gallery, OverlaySheet, ShardManifest
from sonoforge_trainer.decode import decode
from sonoforge_trainer.evaluate.dataset import Table
from sonoforge_trainer.evaluate.errors import EvaluationDataError
from sonoforge_trainer.evaluate.evidence import evidence_of
from sonoforge_trainer.evaluate.metrics import Ints
from sonoforge_trainer.evaluate.neighbours import nearest, neighbour_sheet
from sonoforge_trainer.evaluate.overlays import Extremes, extremes, overlay_sheet
from sonoforge_trainer.evaluate.problem import Finding
from sonoforge_trainer.evaluate.protocols import Material
from sonoforge_trainer.evaluate.segment import decode_mask
from sonoforge_trainer.shards.reader import base_of
from sonoforge_trainer.storage import Storage

Images = Callable[[int], torch.Tensor]
"""The image [C, H, W] uint8 of a row of the table."""


def leave_artifacts(
    request: EvaluationRequest, material: Material, findings: Mapping[str, Finding], storage: Storage
) -> Artifacts:
    """Write the documents and their pictures; returns the documents' names. Raises StorageError, EvaluationDataError.

    No document and no name holds an identifier of a sample or a patient. The pictures are images of the set.
    """
    evaluation, table = request.evaluation, material.selection.table
    folder, stem = request.result_uri.rpartition("/")[0], f"{evaluation.name}-{request.id}"
    evidence = evidence_of(evaluation, table.manifest.dataset_digest, {n: f.samples for n, f in findings.items()})
    gallery, pictures = _gallery(material, findings, stem, storage)
    names = Artifacts(evidence=f"{stem}/evidence.json", gallery=f"{stem}/gallery.json")
    for name, data in pictures.items():
        storage.write(f"{folder}/{name}", data)
    storage.write(f"{folder}/{names.evidence}", evidence.to_json().encode())
    storage.write(f"{folder}/{names.gallery}", gallery.to_json().encode())
    return names


@dataclass(frozen=True)
class _Case:
    """A protocol whose best and worst segmentations are shown."""

    protocol: str
    classes: tuple[str, ...]
    predict: Callable[[Sequence[int]], list[Ints]]
    found: Extremes

    def sheet(self, rows: Sequence[int], images: Images, table: Table, name: str) -> tuple[OverlaySheet, bytes]:
        """Document and PNG; `rows` are the rows of the test images with a mask."""
        return overlay_sheet(
            self.found,
            self.classes,
            images=lambda number: images(rows[number]),
            truths=lambda number: decode_mask(table.records[rows[number]].mask or b"", len(self.classes)),
            predicted=self.predict(self.found.images),
            protocol=self.protocol,
            name=name,
        )


def _gallery(
    material: Material, findings: Mapping[str, Finding], stem: str, storage: Storage
) -> tuple[Gallery, dict[str, bytes]]:
    """The document, and its pictures by name."""
    selection, table = material.selection, material.selection.table
    parts = next(iter(material.model.inputs["knn"].values()))  # CLS; a floor has its only features
    near = nearest(selection, material.features, parts, material.device)
    masked = [int(row) for row in selection.rows["test"] if table.records[row].mask is not None]
    cases = _cases(findings)
    wanted = {masked[number] for case in cases for number in case.found.images} | (near.rows if near else set())
    images = read_images(wanted, table, material.evaluation.shards, material.model.channels, storage)
    pictures: dict[str, bytes] = {}
    neighbours, overlays = None, []
    if near is not None:
        labels = [record.fields.get(material.evaluation.label, "") for record in table.records]
        name = f"{stem}/neighbours.png"
        neighbours, pictures[name] = neighbour_sheet(near, labels, images, name)
    for case in cases:
        name = f"{stem}/{case.protocol}.png"
        document, pictures[name] = case.sheet(masked, images, table, name)
        overlays.append(document)
    return Gallery(neighbours=neighbours, overlays=tuple(overlays)), pictures


def _cases(findings: Mapping[str, Finding]) -> list[_Case]:
    cases = []
    for protocol, finding in findings.items():
        if finding.masks is None or finding.samples is None:
            continue
        found = extremes(finding.samples)
        if found is not None:
            cases.append(_Case(protocol, finding.samples.classes, finding.masks, found))
    return cases


def read_images(rows: Iterable[int], table: Table, shards_uri: str, channels: int, storage: Storage) -> Images:
    """The images [C, H, W] uint8 of a few rows, by row: one ranged read each, not a second reading of the set."""
    places = _places(table.manifest)
    found: dict[int, torch.Tensor] = {}
    for row in sorted(rows):
        shard, offset, length = places[table.records[row].position]
        data = storage.read_range(f"{base_of(shards_uri)}/{shard}", offset, length)
        if hashlib.sha256(data).digest() != table.records[row].image_digest:
            raise EvaluationDataError(f"{shard}: the shard changed while it was evaluated; build the set again")
        found[row] = torch.from_numpy(decode(data, channels).copy())
    return found.__getitem__


def _places(manifest: ShardManifest) -> list[tuple[str, int, int]]:
    """Shard, offset and length of the image of every sample of the manifest."""
    return [
        (shard.name, offset, length)
        for shard in manifest.shards
        for offset, length in zip(shard.offsets, shard.lengths, strict=True)
    ]
