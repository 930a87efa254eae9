"""HC18: fetal heads with an ellipse drawn around each, and its circumference."""

from __future__ import annotations

import re
from pathlib import Path

from sonoforge_trainer.datasets.findings import Check
from sonoforge_trainer.datasets.importer import About, Importer, Source, find
from sonoforge_trainer.datasets.masks import OutlineMask
from sonoforge_trainer.datasets.record import ImageFile, Record, RecordList
from sonoforge_trainer.datasets.splits import by_group
from sonoforge_trainer.datasets.tables import plain_name, read_table
from sonoforge_trainer.shards.faults import SourceError

TRAIN, TEST = "training_set", "test_set"
TRAIN_TABLE, TEST_TABLE = "training_set_pixel_size_and_HC.csv", "test_set_pixel_size.csv"
_NAME = re.compile(r"(\d+)_(\d*)HC\.png")
_SIZE, _CIRCUMFERENCE = "pixel size(mm)", "head circumference (mm)"
_LABELLED, _UNLABELLED = 999, 335

ABOUT = About(
    "hc18",
    "HC18: fetal head circumference in 2D ultrasound",
    "https://doi.org/10.5281/zenodo.1327317",
    "CC BY 4.0",
    "van den Heuvel T.L.A. et al., Automated measurement of fetal head circumference using 2D ultrasound images, "
    "PLoS ONE 13(8), e0200412 (2018)",
    ("background", "fetal head"),
)


def read(source: Source) -> list[Record]:
    """The labelled images, and those of the challenge's test as `unlabelled`. Raises SourceError."""
    folder = find(source.root, TRAIN)
    found = RecordList()
    for name, exam, row in _rows(find(source.root, TRAIN_TABLE, "file"), (_SIZE, _CIRCUMFERENCE)):
        size, circumference = _number(row, _SIZE), _number(row, _CIRCUMFERENCE)
        annotation = folder / f"{name.removesuffix('.png')}_Annotation.png"
        found.add(
            f"{TRAIN}/{name}",
            ImageFile(folder / name),
            [folder / name, annotation],
            OutlineMask(annotation, circumference / size),
            clip=f"train {exam}",
            fields={"pixel_size_mm": row[_SIZE], "head_circumference_mm": row[_CIRCUMFERENCE]},
        )
    source.findings.add("count", abs(len(found.records) - _LABELLED))
    exams = [record.row.clip for record in found.records]
    source.findings.add("repeats", len(exams) - len(set(exams)))
    hidden = folder.parent / TEST
    if hidden.is_dir():
        before = len(found.records)
        for name, exam, row in _rows(find(source.root, TEST_TABLE, "file"), (_SIZE,)):
            path = hidden / name
            found.add(
                f"{TEST}/{name}",
                ImageFile(path),
                [path],
                split="unlabelled",
                clip=f"test {exam}",
                fields={"pixel_size_mm": row[_SIZE]},
            )
        source.findings.add("count", abs(len(found.records) - before - _UNLABELLED))
    return found.records


def _rows(table: Path, columns: tuple[str, ...]) -> list[tuple[str, str, dict[str, str]]]:
    """(file name, number of the exam, row) of each row."""
    rows = []
    for number, row in enumerate(read_table(table, ("filename", *columns)).rows, 1):
        name = plain_name(row["filename"], f"{table.name}: row {number}: filename")
        match = _NAME.fullmatch(name)
        if match is None:
            raise SourceError(f"{table.name}: row {number}: filename: allowed: names like 000_HC.png and 010_2HC.png")
        rows.append((name, match.group(1), row))
    return rows


def _number(row: dict[str, str], column: str) -> float:
    try:
        value = float(row[column])
    except ValueError:
        value = 0.0
    if not 0 < value < 1e4:
        raise SourceError(f"the table of {TRAIN}: {column}: found something that is no length; download it again")
    return value


IMPORTER = Importer(
    ABOUT,
    read,
    by_group(
        "drawn by exam (the number before _HC): 0.7 train, 0.1 val, 0.2 test; the challenge's test images have no "
        "annotation and are unlabelled"
    ),
    (
        Check("count", "warning", "images more or fewer than the published 999 and 335"),
        Check("repeats", "note", "images are further ones of an exam; an exam stays in one split"),
        Check("outline-open", "note", "outlines are cut by the image's border; the ellipse through them was filled"),
        Check("circumference", "warning", "outlines measure over 3 % more or less than the table says"),
    ),
)
