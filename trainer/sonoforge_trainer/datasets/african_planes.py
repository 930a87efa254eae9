"""Fetal planes of five African centres: a small external set for models trained elsewhere."""

from __future__ import annotations

from sonoforge_trainer.datasets.findings import Check
from sonoforge_trainer.datasets.importer import About, Importer, Source, find
from sonoforge_trainer.datasets.record import ImageFile, Record, RecordList
from sonoforge_trainer.datasets.splits import by_group
from sonoforge_trainer.datasets.tables import plain_name, read_table, strange_spaces
from sonoforge_trainer.shards.faults import SourceError

TABLE = "African_planes_database.csv"
CENTRES = ("Algeria", "Egypt", "Ghana", "Malawi", "Uganda")
PLANES = ("Fetal abdomen", "Fetal brain", "Fetal femur", "Fetal thorax")
_ROWS = 450

ABOUT = About(
    "african-planes",
    "Maternal fetal ultrasound planes from low-resource imaging settings in five African countries",
    "https://doi.org/10.5281/zenodo.7540448",
    "CC BY 4.0",
    "Sendra-Balcells C. et al., Generalisability of fetal ultrasound deep learning models to low-resource imaging "
    "settings in five African countries, Scientific Reports 13, 2728 (2023)",
)


def read(source: Source) -> list[Record]:
    """One record a row of the table; patients are keyed by centre and number. Raises SourceError."""
    file = find(source.root, TABLE, "file")
    table = read_table(file, ("Patient_num", "Plane", "Train", "Center", "Filename"))
    found = RecordList()
    numbers: dict[str, set[str]] = {}
    seen: set[str] = set()
    for number, row in enumerate(table.rows, 1):
        centre = row["Center"]
        for column, allowed in (("Center", CENTRES), ("Plane", PLANES)):
            if row[column] not in allowed:
                raise SourceError(f"{TABLE}: row {number}: {column}: not one of {', '.join(allowed)}")
        name = plain_name(row["Filename"], f"{TABLE}: row {number}: Filename").removesuffix(".png") + ".png"
        reference = f"{centre}/{name}"
        if reference in seen:
            source.findings.add("rows-twice")
            continue
        seen.add(reference)
        numbers.setdefault(row["Patient_num"], set()).add(centre)
        path = file.parent / centre / name
        found.add(
            reference,
            ImageFile(path),
            [path],
            label=row["Plane"],
            patient=f"{centre}/{row['Patient_num']}",
            fields={"centre": centre, "published_split": {"1": "train", "0": "test"}.get(row["Train"], "unknown")},
        )
    source.findings.add("header-space", strange_spaces(table))
    source.findings.add("rows", abs(len(table.rows) - _ROWS))
    source.findings.add("patient-numbers", sum(len(centres) > 1 for centres in numbers.values()))
    return found.records


IMPORTER = Importer(
    ABOUT,
    read,
    by_group("drawn by patient (centre and number): 0.7 train, 0.1 val, 0.2 test; the column Train is kept as a field"),
    (
        Check("header-space", "note", "column names have space around them; it was removed"),
        Check("rows", "warning", "rows more or fewer than the 450 of the published table"),
        Check("rows-twice", "warning", "rows name an image again; the first row counts"),
        Check("patient-numbers", "note", "patient numbers are used by several centres; patients are centre and number"),
    ),
)
