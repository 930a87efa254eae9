"""FASS: fetal abdominal structures, in NumPy files that hold a pickled dictionary."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sonoforge_trainer.datasets.findings import Check
from sonoforge_trainer.datasets.formats.objectarray import read_dictionary
from sonoforge_trainer.datasets.importer import About, Importer, Source, files, find
from sonoforge_trainer.datasets.masks import as_png
from sonoforge_trainer.datasets.record import Indices, MaskPixels, Record, RecordList
from sonoforge_trainer.datasets.splits import by_group
from sonoforge_trainer.datasets.volumes import picture_of
from sonoforge_trainer.shards.faults import ImageError, SourceError

FOLDER = "ARRAY_FORMAT"
_IMAGES = 1588
STRUCTURES = ("artery", "liver", "stomach", "vein")
"""Mask values 1 to 4."""
PAINT_ORDER = ("liver", "stomach", "vein", "artery")
"""Where structures overlap the later one is seen: large ones first, so that small ones stay whole."""
_NAME = re.compile(r"P(\d+)_IMG\d+")

ABOUT = About(
    "fass",
    "FASS: fetal abdominal structures segmentation",
    "https://doi.org/10.17632/4gcpm9dsc3.1",
    "unknown; see the source",
    "Da Correggio K.S. et al., Fetal abdominal structures segmentation dataset using ultrasonic images, Mendeley Data "
    "V1 (2023), doi 10.17632/4gcpm9dsc3.1",
    ("background", *STRUCTURES),
)


@dataclass(frozen=True)
class FassImage:
    """The picture of one file."""

    path: Path

    def read(self) -> bytes:
        """A PNG. Raises ImageError."""
        return as_png(picture_of(_array(read_dictionary(self.path), "image")))


@dataclass(frozen=True)
class FassMask:
    """The structures of one file, painted over each other."""

    path: Path

    def read(self) -> MaskPixels:
        """The class indices. Raises ImageError."""
        structures = read_dictionary(self.path).get("structures")
        if not isinstance(structures, dict) or not structures:
            raise ImageError("the file has no structures")
        unknown = set(structures) - set(STRUCTURES)
        if unknown:
            raise ImageError(f"the file has {len(unknown)} unknown structures; allowed: {', '.join(STRUCTURES)}")
        indices: Indices | None = None
        painted = 0
        for name in PAINT_ORDER:
            if name not in structures:
                continue
            inside = _array(structures, name) > 0
            if inside.ndim != 2 or (indices is not None and inside.shape != indices.shape):
                raise ImageError("the structures of the file have different sizes")
            indices = np.zeros(inside.shape, np.uint8) if indices is None else indices
            painted += int(inside.sum())
            indices[inside] = STRUCTURES.index(name) + 1
        assert indices is not None
        notes = ["overlap"] * (painted > int((indices > 0).sum())) + ["absent"] * (len(structures) < len(STRUCTURES))
        return MaskPixels(indices, tuple(notes))


def _array(values: dict[Any, Any], name: str) -> Indices:
    found = values.get(name)
    if not isinstance(found, np.ndarray) or found.dtype != np.uint8:
        raise ImageError(f"the file has no 8-bit array {name!r}")
    return found


def read(source: Source) -> list[Record]:
    """One record a file of ARRAY_FORMAT. Raises SourceError."""
    folder = find(source.root, FOLDER)
    found = RecordList()
    for number, path in enumerate(files(folder, ".npy"), 1):
        match = _NAME.fullmatch(path.stem)
        if match is None:
            raise SourceError(f"{FOLDER}: file {number}: allowed: names like P01_IMG1.npy; P01 is the patient")
        source.findings.add("no-picture", int(not (folder.parent / "IMAGES" / f"{path.stem}.png").is_file()))
        found.add(
            f"{FOLDER}/{path.name}", FassImage(path), [path], FassMask(path), patient=f"P{int(match.group(1)):02d}"
        )
    source.findings.add("count", abs(len(found.records) - _IMAGES))
    return found.records


IMPORTER = Importer(
    ABOUT,
    read,
    by_group("drawn by patient (P01 of P01_IMG1): 0.7 train, 0.1 val, 0.2 test"),
    (
        Check(
            "overlap", "note", f"masks have overlapping structures; painted {', '.join(PAINT_ORDER)}, the last on top"
        ),
        Check("absent", "note", "files lack one of the four structures; it counts as not seen"),
        Check("no-picture", "note", "arrays have no picture of the same name in IMAGES; the array's picture is used"),
        Check("count", "warning", "files more or fewer than the published 1,588"),
    ),
)
