"""COCO instance files: images, categories, and polygons or run lengths, painted into index masks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sonoforge_trainer.datasets.findings import Check
from sonoforge_trainer.datasets.importer import About, Importer, Source
from sonoforge_trainer.datasets.masks import polygon
from sonoforge_trainer.datasets.record import ImageFile, MaskPixels, Record, RecordList
from sonoforge_trainer.datasets.splits import as_published
from sonoforge_trainer.shards.faults import ImageError, SourceError
from sonoforge_trainer.shards.sources import named_group

CHECKS = (
    Check("overlap", "note", "masks have overlapping structures; later annotations of the file lie on top"),
    Check("crowd", "note", "annotations are crowds (iscrowd 1); they were painted like the others"),
    Check("boxes", "warning", "annotations have a box and no outline; they were left out"),
    Check("several-labels", "warning", "images show several categories; they have no label"),
)


@dataclass(frozen=True)
class Shape:
    """One annotation of an image."""

    index: int
    """Mask value: the place of its category, from 1."""
    outline: Any
    """The `segmentation` of the file: polygons, or run lengths."""


@dataclass(frozen=True)
class PaintedMask:
    """All annotations of an image, the later over the earlier."""

    size: tuple[int, int]
    """(width, height)."""
    shapes: tuple[Shape, ...]

    def read(self) -> MaskPixels:
        """The class indices. Raises ImageError."""
        indices = np.zeros(self.size[::-1], np.uint8)
        overlap = False
        for shape in self.shapes:
            inside = _inside(shape.outline, self.size)
            overlap = overlap or bool(((indices > 0) & (indices != shape.index) & inside).any())
            indices[inside] = shape.index
        return MaskPixels(indices, ("overlap",) * overlap)


def _inside(outline: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Pixels of one annotation, [height, width]. Raises ImageError."""
    try:
        if isinstance(outline, list):
            return _polygons([[float(value) for value in points] for points in outline], size)
        (height, width), counts = outline["size"], outline["counts"]
        lengths = _counts(counts) if isinstance(counts, str) else [int(count) for count in counts]
    except ImageError:
        raise
    except (TypeError, KeyError, ValueError):
        raise ImageError("an annotation has neither polygons nor run lengths") from None
    if (width, height) != size:
        raise ImageError("an annotation's run lengths are of another size than the image")
    return _runs(lengths, size)


def _polygons(outlines: Sequence[list[float]], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Pixels of any of the polygons."""
    if any(len(points) < 6 or len(points) % 2 for points in outlines):
        raise ImageError("an annotation has an outline of fewer than three points")
    whole = np.zeros(size[::-1], np.bool_)
    for points in outlines:
        whole |= polygon(points, size)
    return whole


def _runs(counts: Sequence[int], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Run lengths, first of background, down the columns."""
    if min(counts, default=0) < 0 or sum(counts) != size[0] * size[1]:
        raise ImageError("an annotation's run lengths do not fill the image")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(size).T


def _counts(text: str) -> list[int]:
    """Run lengths of COCO's text form: 5 bits a character from code 48, least first; from the third on, differences."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 30:
            raise ValueError
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (1 << shift) if code & 16 else 0
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError
    return counts


@dataclass(frozen=True)
class CocoRule:
    """What the user says of a COCO set."""

    files: Mapping[str, Path]
    """Split to file; the key is empty where the file's split is drawn."""
    label_from_category: bool = False
    """An image's label is its only category."""
    patient_pattern: str = ""
    """Regular expression in file_name; group 1 is the patient."""
    clip_pattern: str = ""
    """The same for the clip."""


def coco(rule: CocoRule, title: str) -> Importer:
    """An importer of the files that `rule` names. Raises SourceError where they do not agree on categories."""
    documents = {split: _document(file) for split, file in rule.files.items()}
    categories = [_categories(document) for document in documents.values()]
    if any(found != categories[0] for found in categories):
        raise SourceError("the COCO files have different categories; give files of one set")
    names = tuple(categories[0].values())
    about = About("coco", title, "not named", "", "", ("background", *names))
    indices = {number: place for place, number in enumerate(categories[0], 1)}

    def read(source: Source) -> list[Record]:
        found = RecordList()
        for split, document in documents.items():
            _read(document, split, indices, names, rule, source, found)
        references = [record.row.reference for record in found.records]
        if len(set(references)) < len(references):
            raise SourceError("the COCO files name an image more than once")
        return found.records

    return Importer(about, read, as_published("as the files say"), CHECKS)


def _read(
    document: dict[str, Any],
    split: str,
    indices: Mapping[int, int],
    names: tuple[str, ...],
    rule: CocoRule,
    source: Source,
    found: RecordList,
) -> None:
    shapes: dict[int, list[Shape]] = {}
    for annotation in document["annotations"]:
        if annotation.get("category_id") not in indices:
            raise SourceError("a COCO annotation has a category that the file does not define")
        source.findings.add("crowd", int(bool(annotation.get("iscrowd"))))
        if not annotation.get("segmentation"):
            source.findings.add("boxes")
            continue
        shape = Shape(indices[annotation["category_id"]], annotation["segmentation"])
        shapes.setdefault(annotation["image_id"], []).append(shape)
    for number, image in enumerate(document["images"], 1):
        path = PurePosixPath(str(image["file_name"]))
        if path.is_absolute() or ".." in path.parts:
            raise SourceError(f"image {number}: file_name: must be relative to the folder of images and stay inside it")
        mine = tuple(shapes.get(image["id"], ()))
        shown = {shape.index for shape in mine}
        if rule.label_from_category:
            source.findings.add("several-labels", int(len(shown) > 1))
        found.add(
            str(path),
            ImageFile(source.root / path),
            [source.root / path],
            PaintedMask((int(image["width"]), int(image["height"])), mine),
            label=names[min(shown) - 1] if rule.label_from_category and len(shown) == 1 else "",
            split=split,
            patient=named_group(rule.patient_pattern, str(path), number, "--patient-pattern"),
            clip=named_group(rule.clip_pattern, str(path), number, "--clip-pattern"),
        )


def _document(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"the COCO file cannot be read as JSON ({type(error).__name__})") from None
    fields = {
        "images": ("id", "file_name", "width", "height"),
        "annotations": ("image_id",),
        "categories": ("id", "name"),
    }
    for name, keys in fields.items():
        entries = document.get(name) if isinstance(document, dict) else None
        if not isinstance(entries, list) or not all(isinstance(e, dict) and all(k in e for k in keys) for e in entries):
            raise SourceError(f"the COCO file: {name}: needs a list of objects with {', '.join(keys)}")
    return dict(document)


def _categories(document: dict[str, Any]) -> dict[int, str]:
    """Names by id, in the order of the ids."""
    found = {int(category["id"]): str(category["name"]) for category in document["categories"]}
    if not 0 < len(found) < 255:
        raise SourceError("the COCO file: categories: needs 1 to 254 of them")
    return dict(sorted(found.items()))
