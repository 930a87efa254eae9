"""JNU-IFM: intrapartum videos with pubic symphysis and fetal head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sonoforge_trainer.datasets.findings import Check
from sonoforge_trainer.datasets.importer import About, Importer, Source, files, find
from sonoforge_trainer.datasets.masks import channel, renamed
from sonoforge_trainer.datasets.record import ImageFile, MaskPixels, Record, RecordList
from sonoforge_trainer.datasets.splits import by_group
from sonoforge_trainer.datasets.tables import read_table
from sonoforge_trainer.shards.faults import SourceError

LABELS = {"3": "none", "4": "symphysis only", "5": "head only", "6": "symphysis and head"}
"""Values of frame_label."""
_SHOWN = {"none": set[int](), "symphysis only": {1}, "head only": {2}, "symphysis and head": {1, 2}}
_VALUES = {0: 0, 7: 1, 8: 2}
_REMAPPED = {0: 0, 1: 1, 2: 2}

ABOUT = About(
    "jnu-ifm",
    "JNU-IFM: pubic symphysis and fetal head in intrapartum ultrasound videos",
    "https://doi.org/10.6084/m9.figshare.14371652",
    "unknown; see the source",
    "Lu Y. et al., The JNU-IFM dataset for segmenting pubic symphysis-fetal head, Data in Brief 41, 107904 (2022)",
    ("background", "pubic symphysis", "fetal head"),
)


@dataclass(frozen=True)
class SymphysisMask:
    """A mask with the published values 0, 7 and 8, or one that somebody renamed to 0, 1 and 2."""

    path: Path
    label: str
    """What the frame's label says is there; empty where it has none."""

    def read(self) -> MaskPixels:
        """The class indices. Raises ImageError."""
        pixels = channel(self.path)
        notes = []
        low = bool(np.isin(pixels, (1, 2)).any())
        indices = renamed(pixels, _REMAPPED if low else _VALUES)
        if low:
            notes.append("renamed-values")
        if self.label and set(np.unique(indices).tolist()) - {0} != _SHOWN[self.label]:
            notes.append("label-mask")
        return MaskPixels(indices, tuple(notes))


def read(source: Source) -> list[Record]:
    """One record a frame, labelled by what it shows. Videos are clips. Raises SourceError."""
    root = find(source.root, "us_data")
    found = RecordList()
    for video in sorted(path for path in root.iterdir() if (path / "image").is_dir()):
        labels = _labels(video)
        for image in files(video / "image", ".png"):
            frame = image.stem.removeprefix(f"{video.name}_")
            mask = video / "mask" / f"{image.stem}_mask.png"
            label = labels.get(frame, "")
            has_mask = mask.is_file()
            source.findings.add("no-label", int(not label))
            source.findings.add("no-mask", int(not has_mask))
            found.add(
                f"{video.name}/{image.name}",
                ImageFile(image),
                [image, mask],
                SymphysisMask(mask, label) if has_mask else None,
                label=label,
                clip=video.name,
            )
        source.findings.add("enhanced", int((video / "mask_enhance").is_dir()))
    return found.records


def _labels(video: Path) -> dict[str, str]:
    """Label by the number of the frame, which the table writes with or without the video's."""
    file = video / "frame_label.csv"
    if not file.is_file():
        return {}
    labels = {}
    for number, row in enumerate(read_table(file, ("frame_id", "frame_label")).rows, 1):
        if row["frame_label"] not in LABELS:
            raise SourceError(
                f"frame_label.csv: row {number}: frame_label: allowed: "
                + ", ".join(f"{value} ({label})" for value, label in LABELS.items())
            )
        frame = Path(row["frame_id"]).stem.removeprefix(f"{video.name}_")
        labels[frame] = LABELS[row["frame_label"]]
    return labels


IMPORTER = Importer(
    ABOUT,
    read,
    by_group("drawn by video: 0.7 train, 0.1 val, 0.2 test; the set names no patients"),
    (
        Check("renamed-values", "note", "masks have the values 1 and 2 in place of the published 7 and 8"),
        Check("label-mask", "warning", "masks show other structures than the frame's label says; both were kept"),
        Check("no-label", "warning", "frames have no row in frame_label.csv"),
        Check("no-mask", "note", "frames have no mask"),
        Check("enhanced", "note", "videos have a folder mask_enhance, which is for looking at and was not read"),
    ),
)
