"""FETAL_PLANES_DB: maternal-fetal screening planes of two hospitals in Barcelona."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sonoforge_trainer.datasets.findings import Check
from sonoforge_trainer.datasets.importer import About, Importer, Source, files, find
from sonoforge_trainer.datasets.record import ImageFile, Record, RecordList
from sonoforge_trainer.datasets.splits import SplitRule, draw_exactly, draw_validation
from sonoforge_trainer.datasets.tables import plain_name, read_table, strange_spaces
from sonoforge_trainer.shards.faults import SourceError

TABLE = "FETAL_PLANES_DB_data.csv"
_COLUMNS = ("Image_name", "Patient_num", "Plane", "Brain_plane", "Operator", "US_Machine", "Train")
PLANES = ("Fetal abdomen", "Fetal brain", "Fetal femur", "Fetal thorax", "Maternal cervix", "Other")
_ROWS, _TRAIN_ROWS, _TRAIN_PATIENTS = 12_400, 7_129, 896
_VAL_ROWS, _VAL_PATIENTS = 1_325, 180
_SPLITS = {"1": "train", "0": "test"}

ABOUT = About(
    "fetal-planes",
    "FETAL_PLANES_DB: common maternal-fetal ultrasound planes",
    "https://doi.org/10.5281/zenodo.3904280",
    "CC BY 4.0",
    "Burgos-Artizzu X.P. et al., Evaluation of deep convolutional neural networks for automatic classification of "
    "common maternal fetal ultrasound planes, Scientific Reports 10, 10200 (2020)",
)


def read(source: Source) -> list[Record]:
    """One record a row of the table. Raises SourceError."""
    file = find(source.root, TABLE, "file")
    table = read_table(file, _COLUMNS, ";")
    folder = file.parent / "Images"
    found = RecordList()
    for number, row in enumerate(table.rows, 1):
        if row["Plane"] not in PLANES:
            raise SourceError(f"{TABLE}: row {number}: Plane: not one of {', '.join(PLANES)}")
        if row["Train"] not in _SPLITS:
            raise SourceError(f"{TABLE}: row {number}: Train: found something that is neither 0 nor 1")
        name = plain_name(row["Image_name"], f"{TABLE}: row {number}: Image_name") + ".png"
        found.add(
            f"Images/{name}",
            ImageFile(folder / name),
            [folder / name],
            label=row["Plane"],
            split=_SPLITS[row["Train"]],
            patient=row["Patient_num"],
            fields={"brain_plane": row["Brain_plane"], "operator": row["Operator"], "machine": row["US_Machine"]},
        )
    findings = source.findings
    findings.add("header-space", strange_spaces(table))
    findings.add("rows", abs(len(table.rows) - _ROWS))
    findings.add("rows-twice", len(table.rows) - len({row["Image_name"] for row in table.rows}))
    findings.add("patient-name", sum(_numbers_differ(row) for row in table.rows))
    named = {row["Image_name"] + ".png" for row in table.rows}
    findings.add("not-in-table", len({path.name for path in files(folder, ".png")} - named))
    return _unique(found.records)


def split(records: Sequence[Record], groups: Mapping[str, str], seed: int) -> list[Record]:
    """The official test half, and from the other half 180 patients with 1,325 images as val.

    Those are the counts of the split lists that UltraDINO published (arXiv 2506.19552): 5,804 / 1,325 / 5,271 images of
    716 / 180 / 896 patients. Patients are drawn by `draw_exactly`. A table with other counts gets the same share of
    patients, 180 of 896, without a count of images.
    """
    sizes = Counter(record.row.patient for record in records if record.row.split == "train")
    if sum(sizes.values()) != _TRAIN_ROWS or len(sizes) != _TRAIN_PATIENTS:
        return draw_validation(records, groups, _VAL_PATIENTS / _TRAIN_PATIENTS, seed)
    chosen = draw_exactly(sizes, _VAL_PATIENTS, _VAL_ROWS, seed)
    return [
        replace(r, row=replace(r.row, split="val")) if r.row.split == "train" and r.row.patient in chosen else r
        for r in records
    ]


def _unique(records: list[Record]) -> list[Record]:
    """Without rows that name a file again."""
    return list({record.row.reference: record for record in reversed(records)}.values())[::-1]


def _numbers_differ(row: Mapping[str, str]) -> bool:
    """Names are Patient00001_Plane1_10_of_15, and the number is the one of Patient_num."""
    digits = row["Image_name"].removeprefix("Patient").partition("_")[0]
    return not (digits.isdigit() and row["Patient_num"].isdigit() and int(digits) == int(row["Patient_num"]))


IMPORTER = Importer(
    ABOUT,
    read,
    SplitRule(
        "official test half; of the official train half the first draw of 180 patients with 1,325 images is val",
        split,
    ),
    (
        Check("header-space", "note", "column names have space around them; it was removed"),
        Check("rows", "warning", "rows more or fewer than the 12,400 of the published table"),
        Check("rows-twice", "warning", "rows name an image again; the first row counts"),
        Check("patient-name", "warning", "images are named after another patient than their row; the row counts"),
        Check("not-in-table", "note", "images are not in the table; they were left out"),
    ),
)
