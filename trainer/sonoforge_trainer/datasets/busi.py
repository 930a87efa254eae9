"""BUSI: breast ultrasound in three folders of classes, with one or more masks beside each image."""

from __future__ import annotations

import re
from pathlib import Path

from sonoforge_trainer.datasets.findings import Check
from sonoforge_trainer.datasets.importer import About, Importer, Source, files, find
from sonoforge_trainer.datasets.masks import UnionMask
from sonoforge_trainer.datasets.record import ImageFile, Record, RecordList
from sonoforge_trainer.datasets.splits import impossible
from sonoforge_trainer.shards.faults import SourceError

CLASSES = {"benign": 437, "malignant": 210, "normal": 133}
"""Folders and their published numbers of images."""
_MASK = re.compile(r"(.+)_mask(?:_\d+)?")

ABOUT = About(
    "busi",
    "BUSI: breast ultrasound images, benign, malignant and normal",
    "https://scholar.cu.edu.eg/?q=afahmy/pages/dataset",
    "unknown; see the source",
    "Al-Dhabyani W. et al., Dataset of breast ultrasound images, Data in Brief 28, 104863 (2020)",
    ("background", "lesion"),
)


def read(source: Source) -> list[Record]:
    """One record an image; its masks are joined. Raises SourceError."""
    root = find(source.root, "benign").parent
    found = RecordList()
    for name, published in CLASSES.items():
        folder = root / name
        if not folder.is_dir():
            raise SourceError(f"PATH: found benign without {name} beside it; give the folder of the unpacked download")
        masks = _masks(folder)
        images = [path for path in files(folder, ".png") if _MASK.fullmatch(path.stem) is None]
        for image in images:
            mine = masks.pop(image.stem, ())
            source.findings.add("several-masks", int(len(mine) > 1))
            source.findings.add("no-mask", int(not mine))
            found.add(
                f"{name}/{image.name}",
                ImageFile(image),
                [image, *mine],
                UnionMask(mine) if mine else None,
                label=name,
            )
        source.findings.add("orphans", sum(map(len, masks.values())))
        source.findings.add("count", abs(len(images) - published))
    return found.records


def _masks(folder: Path) -> dict[str, tuple[Path, ...]]:
    """Masks by the name of their image: `benign (4)_mask.png`, `benign (4)_mask_1.png`."""
    masks: dict[str, tuple[Path, ...]] = {}
    for path in files(folder, ".png"):
        match = _MASK.fullmatch(path.stem)
        if match:
            masks[match.group(1)] = (*masks.get(match.group(1), ()), path)
    return masks


IMPORTER = Importer(
    ABOUT,
    read,
    impossible("give published lists with --split train=FILE --split val=FILE --split test=FILE"),
    (
        Check("several-masks", "note", "images have several masks; a pixel is lesion where any of them says so"),
        Check("mask-between", "note", "masks have values between 0 and 255; above 127 is lesion"),
        Check("no-mask", "warning", "images have no mask"),
        Check("orphans", "warning", "masks have no image"),
        Check("count", "warning", "images more or fewer than the published 437, 210 and 133"),
    ),
)
